"""A torch tensor over device memory that torch did not allocate, on the device that we say.

Torch asks the driver which device a pointer belongs to, and for a mapped peer's ring that is the peer: copies would then
run in a second context on the other GPU. A DLPack capsule (https://dmlc.github.io/dlpack) carries the device of the reader.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CUDA = 2
_UINT = 1


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class DeviceBytes:
    """Keeps the structures alive that a capsule points to. Must outlive every tensor made from it."""

    def __init__(self, pointer: int, size_bytes: int, device_index: int) -> None:
        self._shape = (ctypes.c_int64 * 1)(size_bytes)
        self._managed = _Managed(
            tensor=_Tensor(
                data=pointer,
                device=_Device(device_type=_CUDA, device_id=device_index),
                ndim=1,
                dtype=_DType(code=_UINT, bits=8, lanes=1),
                shape=self._shape,
                strides=None,
                byte_offset=0,
            ),
            context=None,
            deleter=None,  # the memory is ours to free, after the tensor is gone
        )

    def tensor(self) -> torch.Tensor:
        """All of it as uint8."""
        import torch

        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        capsule = new(ctypes.addressof(self._managed), b"dltensor", None)
        made: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
        return made
