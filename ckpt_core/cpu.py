"""Main memory as a device: a ring is a shared file, a copy is done when the call returns.

The embedded default, and what runs everywhere: the same agents, rings and ranks as on GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.device import CPU, DevicePart, HostBytes, Mark, Unlock
from ckpt_core.errors import ConfigError
from ckpt_core.shm import SharedFile

if TYPE_CHECKING:
    import torch


def _nothing() -> None:
    """Nothing to undo."""


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

    def write(self, offset_bytes: int, source: HostBytes | DevicePart) -> None:
        """Copy now; numpy lets other threads run meanwhile."""
        assert not isinstance(source, DevicePart), "the pool refuses device memory for this device"
        self._file.array[offset_bytes : offset_bytes + source.size].reshape(source.shape)[...] = source

    def mark(self) -> Mark:
        """Reached."""
        return _REACHED

    def timer(self) -> None:
        """None: the host's own spans say it all."""

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

    def timer(self) -> None:
        """None: the host's own spans say it all."""

    def close(self) -> None:
        """Unmap, or leave the mapping to whoever still holds a view of it."""
        self._bytes = None
        self._file.close()


class CpuDevice:
    """Main memory."""

    name = CPU

    def lock(self, pages: HostBytes) -> Unlock:
        """Any memory is fit."""
        return _nothing

    def open_region(self, handle: str) -> tuple[int, Unlock]:
        """Refused."""
        raise ConfigError("engines on CPU cannot take tensors from a GPU; move them to the CPU first")

    def read(self, part: DevicePart) -> HostBytes:
        """Refused."""
        raise ConfigError("engines on CPU cannot take tensors from a GPU; move them to the CPU first")

    def allocate(self, size_bytes: int, directory: Path, label: str) -> CpuBuffer:
        """A shared file `label` in that directory."""
        return CpuBuffer(SharedFile.create(directory / label, size_bytes))

    def map(self, handle: str, size_bytes: int, device_index: int) -> MappedCpuBuffer:
        """Map the file."""
        return MappedCpuBuffer(SharedFile.open(Path(handle), size_bytes))
