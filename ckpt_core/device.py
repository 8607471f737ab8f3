"""Where a ring lives, behind one protocol: the agent's side allocates and copies, the rank's side maps.

The CPU is a device like any other: its memory is a shared file, its copies are done when the call returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ckpt_core.errors import ConfigError
from ckpt_core.shm import SharedFile

if TYPE_CHECKING:
    import torch

HostBytes = npt.NDArray[np.uint8]


class Mark(Protocol):
    """A point in a device's work."""

    def reached(self) -> bool:
        """Whether all work before it is complete. Never blocks."""
        ...


class Buffer(Protocol):
    """Memory for a ring, seen by the agent that owns it."""

    handle: str
    size_bytes: int

    def write(self, offset_bytes: int, source: HostBytes) -> None:
        """Start a copy into it; `source` must stay as it is until a later mark is reached."""
        ...

    def mark(self) -> Mark:
        """A mark after all writes so far."""
        ...

    def close(self) -> None:
        """Give it back. Idempotent."""
        ...


class MappedBuffer(Protocol):
    """The same memory, mapped by a rank."""

    def view(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Bytes of it as uint8 on the rank's device; not a copy."""
        ...

    def mark(self) -> Mark:
        """A mark after all work that this rank has queued on its device so far."""
        ...

    def close(self) -> None:
        """Unmap. Idempotent."""
        ...


class Device(Protocol):
    """A kind of memory."""

    name: str

    def allocate(self, size_bytes: int, directory: Path, label: str) -> Buffer:
        """Memory for a ring. Raises CapacityError."""
        ...

    def map(self, handle: str, size_bytes: int) -> MappedBuffer:
        """Map memory that another process allocated. Raises TransportError."""
        ...


class _Reached:
    """The mark of a device that is never behind."""

    def reached(self) -> bool:
        return True


_REACHED = _Reached()


class CpuBuffer:
    """A ring in a shared file."""

    def __init__(self, file: SharedFile) -> None:
        self._file = file
        self.handle = str(file.path)
        self.size_bytes = file.size_bytes

    def write(self, offset_bytes: int, source: HostBytes) -> None:
        """Copy now; numpy lets other threads run meanwhile."""
        self._file.array[offset_bytes : offset_bytes + source.size] = source

    def mark(self) -> Mark:
        """Reached."""
        return _REACHED

    def close(self) -> None:
        """Unmap and remove the file."""
        self._file.close()


class MappedCpuBuffer:
    """A ring of another process in a shared file."""

    def __init__(self, file: SharedFile) -> None:
        import torch

        self._file = file
        self._bytes: torch.Tensor | None = torch.from_numpy(file.array)

    def view(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Bytes of the file."""
        assert self._bytes is not None, "view of a closed ring"
        return self._bytes[offset_bytes : offset_bytes + size_bytes]

    def mark(self) -> Mark:
        """Reached: CPU operators are done when they return."""
        return _REACHED

    def close(self) -> None:
        """Unmap, or leave the mapping to whoever still holds a view of it."""
        self._bytes = None
        self._file.close()


class CpuDevice:
    """Main memory."""

    name = "cpu"

    def allocate(self, size_bytes: int, directory: Path, label: str) -> CpuBuffer:
        """A shared file `label` in that directory."""
        return CpuBuffer(SharedFile.create(directory / label, size_bytes))

    def map(self, handle: str, size_bytes: int) -> MappedCpuBuffer:
        """Map the file."""
        return MappedCpuBuffer(SharedFile.open(Path(handle), size_bytes))


def device_of(name: str) -> Device:
    """The device that a ring offer names.

    Raises:
        ConfigError: this build has none of that name.
    """
    if name == "cpu":
        return CpuDevice()
    raise ConfigError(f"no device {name!r}; known: cpu")
