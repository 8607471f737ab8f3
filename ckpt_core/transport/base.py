"""What every transport offers to the pipeline.

Lifecycle: the agent makes a `RingWriter`, its offer travels to the ranks, each maps it as a `RingReader`. Then, without
any call between the two sides:

    agent                                    every rank
    writer.fill(step, source)  -- starts     reader.published() >= step.seq   -- polled
    writer.advance()           -- publishes  reader.view(...)                 -- use it
    writer.done() >= seq       -- polled     reader.release(seq)              -- after its own device is done with it

Neither side waits on anything of the other but these two numbers, so that a dead peer blocks nobody (DESIGN section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ckpt_core.device import DevicePart, HostBytes, StreamTimer
from ckpt_core.plan import Step
from ckpt_core.wire import RingOffer

if TYPE_CHECKING:
    import torch


class RingWriter(Protocol):
    """The agent's side of its ring."""

    def offer(self) -> RingOffer:
        """How ranks map it."""
        ...

    def fill(self, step: Step, parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        """Start to copy the parts (offset in the bucket, bytes) of the step's bucket. Steps come in order of seq."""
        ...

    def advance(self) -> int:
        """Publish what has arrived; the highest published seq."""
        ...

    def done(self) -> int:
        """The highest seq that every receiver is done with."""
        ...

    def trace(self) -> StreamTimer | None:
        """From now on time the copies on the device, if it has a clock of its own."""
        ...

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        ...


class RingReader(Protocol):
    """A rank's side of one agent's ring."""

    def published(self) -> int:
        """The highest seq whose bytes are in the ring."""
        ...

    def view(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Those bytes of the ring as uint8 on the rank's device, not a copy."""
        ...

    def release(self, seq: int) -> None:
        """This rank is done with everything up to seq."""
        ...

    def drained(self) -> bool:
        """Whether every release has reached the owner."""
        ...

    def timer(self) -> StreamTimer | None:
        """Times this rank's work on its device, if that has a clock of its own."""
        ...

    def close(self) -> None:
        """Unmap. Views must not be used afterwards. Idempotent."""
        ...
