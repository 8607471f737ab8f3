"""GPUs as things to measure: which ones there are, and copies into, on and between them. By the driver, without torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from ctypes import byref, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ckpt_core import numa
from ckpt_core.cuda import driver

_COPY_BYTES = 256 << 20  # beyond any cache: half of it, in a copy on a GPU, is twice the second level of an H200
_PEER_ACCESS_ALREADY_ENABLED = 704


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """A GPU as its driver knows it."""

    uuid: str
    name: str
    pci_bus_id: str


_SIGNATURES = {
    "cuMemcpyPeerAsync": [c_ulonglong, c_void_p, c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuDeviceCanAccessPeer": [c_void_p, c_int, c_int],
    "cuCtxEnablePeerAccess": [c_void_p, c_uint],
    "cuCtxDisablePeerAccess": [c_void_p],
    "cuCtxGetCurrent": [c_void_p],
    "cuDeviceGetName": [c_void_p, c_int, c_int],
    "cuDeviceGetPCIBusId": [c_void_p, c_int, c_int],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDriverGetVersion": [c_void_p],
}


@functools.cache
def _cuda() -> ctypes.CDLL:
    cuda = driver.library()
    for name, kinds in _SIGNATURES.items():
        getattr(cuda, name).argtypes = kinds
    return cuda


def _device(ordinal: int) -> int:
    device = c_int()
    driver.check(_cuda().cuDeviceGet(byref(device), ordinal), f"cuDeviceGet({ordinal})")
    return device.value


def _device_text(call: str, ordinal: int) -> str:
    text = ctypes.create_string_buffer(256)
    driver.check(getattr(_cuda(), call)(text, len(text), _device(ordinal)), call)
    return text.value.decode()


def pci_bus_id(ordinal: int) -> str:
    """Of a visible GPU, for `numa`."""
    return _device_text("cuDeviceGetPCIBusId", ordinal)


def visible_gpus() -> tuple[GpuIdentity, ...]:
    """Of this process, in order; () without a driver."""
    return tuple(
        GpuIdentity(
            uuid=driver.device_uuid(ordinal),
            name=_device_text("cuDeviceGetName", ordinal),
            pci_bus_id=pci_bus_id(ordinal),
        )
        for ordinal in range(driver.device_count())
    )


def driver_version() -> str:
    """Of the kernel's module, and of the CUDA interface that the library offers."""
    api = c_int()
    driver.check(_cuda().cuDriverGetVersion(byref(api)), "cuDriverGetVersion")
    try:
        module = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        module = "unknown"
    return f"{module}, CUDA {api.value // 1000}.{api.value % 1000 // 10}"


class _Gpu:
    """One GPU: 256 MiB of its memory, as much page-locked memory of its node, a stream."""

    def __init__(self, ordinal: int, cleanup: contextlib.ExitStack) -> None:
        self.ordinal = ordinal
        self.context = driver.Context(ordinal)
        cleanup.callback(self.context.release)
        self.handle = c_void_p()
        driver.check(_cuda().cuCtxGetCurrent(byref(self.handle)), "cuCtxGetCurrent")
        with numa.at(pci_bus_id(ordinal)):
            self._host = np.ones(_COPY_BYTES, dtype=np.uint8)  # touched here, so that it lies here
        self.source = self._host.ctypes.data
        driver.register_host(self.source, _COPY_BYTES, read_only=False)
        cleanup.callback(driver.unregister_host, self.source)
        self.memory = driver.allocate(_COPY_BYTES)
        cleanup.callback(driver.free, self.memory)
        self.stream = driver.Stream()
        cleanup.callback(self.stream.close)
        cleanup.callback(self.stream.synchronize)
        cleanup.callback(self.context.activate)  # runs first: what follows acts on the current context


class CudaDevices:
    """The visible GPUs, by index. Copies are of `size_bytes`, started and not waited for."""

    size_bytes = _COPY_BYTES

    def __init__(self, cleanup: contextlib.ExitStack) -> None:
        self._cleanup = cleanup
        self._gpus = [_Gpu(ordinal, cleanup) for ordinal in range(driver.device_count())]
        self.count = len(self._gpus)
        self._enabled: dict[tuple[int, int], bool] = {}

    def copy_in(self, gpu: int) -> None:
        """From page-locked host memory."""
        one = self._activate(gpu)
        one.stream.host_to_device(one.memory, one.source, _COPY_BYTES)

    def copy_within(self, gpu: int) -> None:
        """On the device: two copies of one half of the memory to the other, `size_bytes` in all."""
        one, half = self._activate(gpu), _COPY_BYTES // 2
        one.stream.device_to_device(one.memory + half, one.memory, half)
        one.stream.device_to_device(one.memory, one.memory + half, half)

    def can_read(self, reader: int, owner: int) -> bool:
        """Whether one can map the other's memory. If so, access is enabled until the GPUs are closed."""
        if (reader, owner) not in self._enabled:
            self._enabled[reader, owner] = self._enable(self._activate(reader), self._gpus[owner])
        return self._enabled[reader, owner]

    def copy_from(self, reader: int, owner: int) -> None:
        """From the other device."""
        to, source = self._activate(reader), self._gpus[owner]
        driver.check(
            _cuda().cuMemcpyPeerAsync(
                to.memory, to.handle, source.memory, source.handle, _COPY_BYTES, to.stream.handle
            ),
            f"copying from GPU {owner} to GPU {reader}",
        )

    def synchronize(self, gpu: int) -> None:
        """Wait for the copies of one."""
        self._activate(gpu).stream.synchronize()

    def _activate(self, gpu: int) -> _Gpu:
        self._gpus[gpu].context.activate()
        return self._gpus[gpu]

    def _enable(self, reader: _Gpu, owner: _Gpu) -> bool:
        can = c_int()
        status = _cuda().cuDeviceCanAccessPeer(byref(can), _device(reader.ordinal), _device(owner.ordinal))
        driver.check(status, "cuDeviceCanAccessPeer")
        if not can.value:
            return False
        status = _cuda().cuCtxEnablePeerAccess(owner.handle, 0)
        if status != _PEER_ACCESS_ALREADY_ENABLED:
            driver.check(status, f"access from GPU {reader.ordinal} to GPU {owner.ordinal}")
            self._cleanup.callback(lambda: _cuda().cuCtxDisablePeerAccess(owner.handle))
            self._cleanup.callback(reader.context.activate)
        return True


@contextlib.contextmanager
def open_gpus() -> Iterator[CudaDevices]:
    """Take the visible GPUs for measuring, 256 MiB each, and give everything back after the block.

    Raises:
        CapacityError: a GPU has not that much memory left.
        TransportError: a GPU does not work.
    """
    with contextlib.ExitStack() as cleanup:
        yield CudaDevices(cleanup)
