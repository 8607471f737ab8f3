"""Where a ring lives, behind one protocol: the agent's side allocates and copies, the rank's side maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ckpt_core.trace import Span, SpanStage

if TYPE_CHECKING:
    import torch

HostBytes = npt.NDArray[np.uint8]  # contiguous, or rows of contiguous bytes at equal distances
CPU = "cpu"


Unlock = Callable[[], None]


class StreamTimer(Protocol):
    """Times what a device does between two points of its stream, without waiting for it."""

    def start(self) -> None:
        """A span begins here."""
        ...

    def stop(self, stage: SpanStage, bucket: int, size_bytes: int) -> None:
        """It ends here."""
        ...

    def take(self) -> tuple[tuple[Span, ...], int]:
        """Spans that the device has ended, and how many were dropped."""
        ...

    def close(self) -> None:
        """Give its events back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePart:
    """Bytes in the memory of an accelerator, at an address that is valid in this process."""

    address: int
    size: int


class Mark(Protocol):
    """A point in a device's work."""

    def reached(self) -> bool:
        """Whether all work before it is complete. Never blocks."""
        ...


class Buffer(Protocol):
    """Memory for a ring, seen by the agent that owns it."""

    handle: str
    size_bytes: int

    def write(self, offset_bytes: int, source: HostBytes | DevicePart) -> None:
        """Start a copy into it; `source` must stay as it is until a later mark is reached."""
        ...

    def mark(self) -> Mark:
        """A mark after all writes so far."""
        ...

    def timer(self) -> StreamTimer | None:
        """Times the writes; None where they are done when the call returns."""
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

    def timer(self) -> StreamTimer | None:
        """Times this rank's work on its device; None where it is done when a call returns."""
        ...

    def close(self) -> None:
        """Unmap. Idempotent."""
        ...


class Device(Protocol):
    """A kind of memory."""

    name: str

    def lock(self, pages: HostBytes) -> Unlock:
        """Make host memory fit for fast copies from it; call what is returned before the memory goes."""
        ...

    def open_region(self, handle: str) -> tuple[int, Unlock]:
        """Address of another process's device memory, and what closes it. Raises ConfigError where there is no such memory."""
        ...

    def read(self, part: DevicePart) -> HostBytes:
        """A copy of device memory in host memory."""
        ...

    def allocate(self, size_bytes: int, directory: Path, label: str) -> Buffer:
        """Memory for a ring. Raises CapacityError."""
        ...

    def map(self, handle: str, size_bytes: int, device_index: int) -> MappedBuffer:
        """Map memory that another process allocated, for use on this process's device of that index.

        Raises:
            TransportError: it cannot be mapped.
        """
        ...
