"""Element types of checkpoint tensors, by their safetensors names. No torch: the planner knows sizes only."""

from __future__ import annotations

import math
from enum import Enum


class DType(Enum):
    """A safetensors element type; the value is its name in the file header.

    Attributes:
        itemsize: bytes of one element.
    """

    itemsize: int

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    F8_E8M0 = "F8_E8M0"
    I16 = "I16"
    U16 = "U16"
    F16 = "F16"
    BF16 = "BF16"
    I32 = "I32"
    U32 = "U32"
    F32 = "F32"
    I64 = "I64"
    U64 = "U64"
    F64 = "F64"
    C64 = "C64"

    # Members are singletons. Enum's own hash is a Python function, and planning looks types up a hundred thousand times.
    __hash__ = object.__hash__

    @property
    def torch_name(self) -> str:
        """Name of the attribute of the torch module that is this type."""
        return _TORCH_NAME[self]

    @classmethod
    def from_torch_name(cls, name: str) -> DType:
        """The type behind `str(torch_dtype)`, with or without the `torch.` prefix.

        Raises:
            KeyError: the type has no safetensors name.
        """
        return _FROM_TORCH[name.removeprefix("torch.")]


_ITEMSIZE = {
    DType.BOOL: 1,
    DType.U8: 1,
    DType.I8: 1,
    DType.F8_E5M2: 1,
    DType.F8_E4M3: 1,
    DType.F8_E8M0: 1,
    DType.I16: 2,
    DType.U16: 2,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I32: 4,
    DType.U32: 4,
    DType.F32: 4,
    DType.I64: 8,
    DType.U64: 8,
    DType.F64: 8,
    DType.C64: 8,
}

for _dtype, _size in _ITEMSIZE.items():
    _dtype.itemsize = _size

_TORCH_NAME = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.I16: "int16",
    DType.U16: "uint16",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I32: "int32",
    DType.U32: "uint32",
    DType.F32: "float32",
    DType.I64: "int64",
    DType.U64: "uint64",
    DType.F64: "float64",
    DType.C64: "complex64",
}

_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAME.items()}


def size_bytes(shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes of a dense tensor of that shape (a scalar has shape () and one element)."""
    return math.prod(shape) * dtype.itemsize
