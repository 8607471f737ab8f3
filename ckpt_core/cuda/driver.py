"""The calls of the CUDA driver that this project makes, by ctypes, each checked.

The driver library comes with every GPU; the runtime library's name depends on what else is installed. All calls act on the
primary context of one device, which is also what torch uses.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

from ckpt_core.errors import CapacityError, ConfigError, TransportError

_NOT_READY = 600
_OUT_OF_MEMORY = 2
_EVENT_DISABLE_TIMING = 2
_MEMORY_HOST, _MEMORY_DEVICE = 1, 2
_STREAM_NON_BLOCKING = 1
_IPC_LAZY_PEER_ACCESS = 1
HOST_REGISTER_PORTABLE = 1
HOST_REGISTER_READ_ONLY = 8


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        *((f"{end}{name}", kind) for end in ("src", "dst") for name, kind in (
            ("XInBytes", c_size_t), ("Y", c_size_t), ("MemoryType", c_uint), ("Host", c_void_p),
            ("Device", c_ulonglong), ("Array", c_void_p), ("Pitch", c_size_t),
        )),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    ]  # fmt: skip


class IpcHandle(ctypes.Structure):
    """The driver's 64 bytes that another process opens."""

    _fields_ = [("reserved", ctypes.c_byte * 64)]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, initialised.

    Raises:
        ConfigError: this machine has none.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"no CUDA driver on this machine ({error}); CPU engines need none") from error
    for name, kinds in _SIGNATURES.items():
        getattr(cuda, name).argtypes = kinds
    status = cuda.cuInit(0)
    if status:
        raise ConfigError(f"the CUDA driver does not start: error {status}; try nvidia-smi")
    return cuda


_SIGNATURES = {
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_ulonglong, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpy2DAsync_v2": [c_void_p, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoH_v2": [c_void_p, c_ulonglong, c_size_t],
    "cuIpcGetMemHandle": [c_void_p, c_ulonglong],
    "cuIpcOpenMemHandle_v2": [c_void_p, IpcHandle, c_uint],
    "cuIpcCloseMemHandle": [c_ulonglong],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventElapsedTime": [c_void_p, c_void_p, c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuMemGetAddressRange_v2": [c_void_p, c_void_p, c_ulonglong],
}


def check(status: int, what: str) -> None:
    """Raise for a status that is not success.

    Raises:
        CapacityError: out of memory.
        TransportError: anything else.
    """
    if status == 0:
        return
    name = c_char_p()
    library().cuGetErrorName(status, byref(name))
    text = f"{what}: {(name.value or b'CUDA error').decode()} ({status})"
    if status == _OUT_OF_MEMORY:
        raise CapacityError(f"{text}; leave the agent more memory on this GPU, or ask for a smaller ring")
    raise TransportError(f"{text}; see the driver's documentation of this error")


def device_count() -> int:
    """Number of visible GPUs; 0 without a driver."""
    try:
        cuda = library()
    except ConfigError:
        return 0
    count = c_int()
    check(cuda.cuDeviceGetCount(byref(count)), "cuDeviceGetCount")
    return count.value


def device_uuid(ordinal: int) -> str:
    """UUID of a visible GPU, as nvidia-smi prints it."""
    device, raw = c_int(), (ctypes.c_ubyte * 16)()
    check(library().cuDeviceGet(byref(device), ordinal), f"cuDeviceGet({ordinal})")
    check(library().cuDeviceGetUuid_v2(byref(raw), device), "cuDeviceGetUuid")
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def ordinal_of(wanted: str) -> int:
    """Ordinal, in this process, of the GPU with that UUID (with or without the GPU- prefix).

    Raises:
        ConfigError: it is not visible here.
    """
    visible = [device_uuid(ordinal) for ordinal in range(device_count())]
    for ordinal, found in enumerate(visible):
        if found.removeprefix("GPU-") == wanted.removeprefix("GPU-"):
            return ordinal
    raise ConfigError(f"GPU {wanted} is not visible here, only {visible}; check CUDA_VISIBLE_DEVICES")


class Context:
    """The primary context of one GPU, made current for the calling thread."""

    def __init__(self, ordinal: int) -> None:
        self._device = c_int()
        check(library().cuDeviceGet(byref(self._device), ordinal), f"cuDeviceGet({ordinal})")
        self._handle = c_void_p()
        check(library().cuDevicePrimaryCtxRetain(byref(self._handle), self._device), "cuDevicePrimaryCtxRetain")
        self.uuid = device_uuid(ordinal)
        self.ordinal = ordinal
        self.activate()

    def activate(self) -> None:
        """Make it current in this thread."""
        check(library().cuCtxSetCurrent(self._handle), "cuCtxSetCurrent")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = c_size_t(), c_size_t()
        check(library().cuMemGetInfo_v2(byref(free), byref(total)), "cuMemGetInfo")
        return free.value, total.value

    def synchronize(self) -> None:
        """Wait for all work of this process on the device."""
        check(library().cuCtxSynchronize(), "cuCtxSynchronize")

    def release(self) -> None:
        """Give the context back to the driver."""
        check(library().cuDevicePrimaryCtxRelease_v2(self._device), "cuDevicePrimaryCtxRelease")


class Stream:
    """A stream that does not wait for the default one."""

    def __init__(self) -> None:
        self.handle = c_void_p()
        check(library().cuStreamCreate(byref(self.handle), _STREAM_NON_BLOCKING), "cuStreamCreate")

    def host_to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Start a copy from page-locked host memory."""
        check(library().cuMemcpyHtoDAsync_v2(target, source, size_bytes, self.handle), "cuMemcpyHtoDAsync")

    def rows_to_device(self, target: int, source: int, shape: tuple[int, ...], *, pitch_bytes: int) -> None:
        """Start a copy of rows (count, bytes) from page-locked host memory, packed on the device."""
        rows, row_bytes = shape
        copy = _Copy2D(
            srcMemoryType=_MEMORY_HOST,
            srcHost=source,
            srcPitch=pitch_bytes,
            dstMemoryType=_MEMORY_DEVICE,
            dstDevice=target,
            dstPitch=row_bytes,
            WidthInBytes=row_bytes,
            Height=rows,
        )
        check(library().cuMemcpy2DAsync_v2(byref(copy), self.handle), "cuMemcpy2DAsync")

    def device_to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Start a copy on the device, or from a peer whose memory is mapped."""
        check(library().cuMemcpyDtoDAsync_v2(target, source, size_bytes, self.handle), "cuMemcpyDtoDAsync")

    def synchronize(self) -> None:
        """Wait for its work."""
        check(library().cuStreamSynchronize(self.handle), "cuStreamSynchronize")

    def close(self) -> None:
        """Destroy it when its work is done."""
        check(library().cuStreamDestroy_v2(self.handle), "cuStreamDestroy")


class Event:
    """A point in a stream, polled on the host and never waited for by another process's device.

    Args:
        timing: keep the time of the point, for `since`.
    """

    def __init__(self, *, timing: bool = False) -> None:
        self._handle = c_void_p()
        flags = 0 if timing else _EVENT_DISABLE_TIMING
        check(library().cuEventCreate(byref(self._handle), flags), "cuEventCreate")

    def record(self, stream: c_void_p | int) -> None:
        """Put it at the present end of a stream."""
        check(library().cuEventRecord(self._handle, stream), "cuEventRecord")

    def reached(self) -> bool:
        """Whether all work before it is complete."""
        status = library().cuEventQuery(self._handle)
        if status == _NOT_READY:
            return False
        check(status, "an earlier operation on the GPU failed")
        return True

    def since(self, earlier: Event) -> float:
        """Seconds on the device between two reached events with timing."""
        milliseconds = ctypes.c_float()
        check(library().cuEventElapsedTime(byref(milliseconds), earlier._handle, self._handle), "cuEventElapsedTime")
        return milliseconds.value / 1e3

    def close(self) -> None:
        """Destroy it."""
        check(library().cuEventDestroy_v2(self._handle), "cuEventDestroy")


def allocate(size_bytes: int) -> int:
    """Device memory from the driver itself, so that its handle is of the kind every process can open."""
    pointer = c_ulonglong()
    check(library().cuMemAlloc_v2(byref(pointer), size_bytes), f"a ring of {size_bytes} bytes in device memory")
    return pointer.value


def free(pointer: int) -> None:
    """Give device memory back."""
    check(library().cuMemFree_v2(pointer), "cuMemFree")


def export(pointer: int) -> str:
    """Handle of an allocation for other processes, in hex."""
    handle = IpcHandle()
    check(library().cuIpcGetMemHandle(byref(handle), pointer), "cuIpcGetMemHandle")
    return bytes(handle).hex()


def open_exported(handle: str) -> int:
    """Map another process's allocation, also one on a peer GPU; its address here."""
    pointer = c_ulonglong()
    raw = IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    check(
        library().cuIpcOpenMemHandle_v2(byref(pointer), raw, _IPC_LAZY_PEER_ACCESS),
        "mapping the ring of another process (needs peer access between the GPUs, and one IPC namespace)",
    )
    return pointer.value


def close_exported(pointer: int) -> None:
    """Unmap it."""
    check(library().cuIpcCloseMemHandle(pointer), "cuIpcCloseMemHandle")


def copy_to_host(target: int, source: int, size_bytes: int) -> None:
    """Copy device memory to host memory, and wait for it."""
    check(library().cuMemcpyDtoH_v2(target, source, size_bytes), "cuMemcpyDtoH")


def register_host(pointer: int, size_bytes: int, *, read_only: bool) -> None:
    """Page-lock host memory for all devices."""
    flags = HOST_REGISTER_PORTABLE | (HOST_REGISTER_READ_ONLY if read_only else 0)
    check(library().cuMemHostRegister_v2(pointer, size_bytes, flags), f"page-locking {size_bytes} bytes of host memory")


def unregister_host(pointer: int) -> None:
    """Unlock it."""
    check(library().cuMemHostUnregister(pointer), "cuMemHostUnregister")


def address_range(pointer: int) -> tuple[int, int]:
    """Start and size of the allocation that a device address lies in."""
    base, size = c_ulonglong(), c_size_t()
    check(library().cuMemGetAddressRange_v2(byref(base), byref(size), pointer), "cuMemGetAddressRange")
    return base.value, size.value
