"""One host: a ring in device memory that every rank maps, and sequence numbers in shared memory.

A number is published only after the owner's own device has completed the copy, seen by polling on the host: no process
ever waits, on its device, for an event of another process, because that wait never ends when the other is killed
(measured on two GPUs: the survivor's streams hang for good).

Each number is one aligned 8-byte word in a cache line of its own, with one writer. CPython stores and loads it in one move;
x86 keeps stores in order. The bytes are digested on arrival, which also covers machines with a weaker order.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.device import Buffer, Device, DevicePart, HostBytes, MappedBuffer, Mark, StreamTimer
from ckpt_core.devices import device_of
from ckpt_core.errors import TransportError
from ckpt_core.plan import Step
from ckpt_core.shm import SharedFile
from ckpt_core.trace import SpanStage
from ckpt_core.wire import RingOffer

if TYPE_CHECKING:
    import torch

_WORDS_PER_LINE = 8
_LINE_BYTES = 64
_MAGIC = 0x636B_7074_7269_6E67  # "ckptring"


class SequenceBlock:
    """The numbers of one ring: what its owner published, and what each receiver is done with."""

    def __init__(self, file: SharedFile, receivers: int) -> None:
        self._file = file
        self._words = file.array.data.cast("q")
        self._receivers = receivers

    @classmethod
    def create(cls, path: Path, receivers: int) -> SequenceBlock:
        """Make the block of a new ring."""
        block = cls(SharedFile.create(path, (2 + receivers) * _LINE_BYTES), receivers)
        block._words[0] = _MAGIC
        return block

    @classmethod
    def open(cls, path: Path, receivers: int) -> SequenceBlock:
        """Map the block of another process's ring.

        Raises:
            TransportError: that file is no such block.
        """
        block = cls(SharedFile.open(path, (2 + receivers) * _LINE_BYTES), receivers)
        if block._words[0] != _MAGIC:
            block.close()
            raise TransportError(f"{path} does not hold the sequence numbers of a ring")
        return block

    @property
    def published(self) -> int:
        """Highest seq whose bytes are in the ring."""
        return self._words[_WORDS_PER_LINE]

    @published.setter
    def published(self, seq: int) -> None:
        self._words[_WORDS_PER_LINE] = seq

    def set_done(self, receiver: int, seq: int) -> None:
        """That receiver is done with everything up to seq."""
        self._words[(2 + receiver) * _WORDS_PER_LINE] = seq

    def done(self) -> int:
        """Highest seq that all receivers are done with."""
        lines = range(2, 2 + self._receivers)
        return min((self._words[line * _WORDS_PER_LINE] for line in lines), default=self.published)

    def expect(self, receivers: int) -> None:
        """Only the first so many will read."""
        self._receivers = receivers

    def close(self) -> None:
        """Unmap; whoever made it removes it. Idempotent."""
        self._words.release()
        self._file.close()


class IpcRingWriter:
    """The agent's side. See `transport.base.RingWriter`. `number` tells the rings of one owner apart."""

    def __init__(
        self, *, owner: int, receivers: int, ring_bytes: int, device: Device, directory: Path, number: int = 0
    ) -> None:
        self._owner = owner
        self._device = device
        self._control_path = directory / f"control-{owner}-{number}"
        self._buffer: Buffer = device.allocate(ring_bytes, directory, f"ring-{owner}-{number}")
        try:
            self._sequence = SequenceBlock.create(self._control_path, receivers)
        except BaseException:
            self._buffer.close()
            raise
        self._in_flight: deque[tuple[int, Mark]] = deque()
        self._timer: StreamTimer | None = None

    def offer(self) -> RingOffer:
        """How ranks map it."""
        return RingOffer(
            owner=self._owner,
            device=self._device.name,
            handle=self._buffer.handle,
            size_bytes=self._buffer.size_bytes,
            control_path=str(self._control_path),
        )

    def fill(self, step: Step, parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        """Start the copies of one bucket."""
        if self._timer is not None:
            self._timer.start()
        for offset, source in parts:
            self._buffer.write(step.ring_offset_bytes + offset, source)
        if self._timer is not None:
            self._timer.stop(SpanStage.COPY, step.index, step.bucket.size_bytes)
        self._in_flight.append((step.seq, self._buffer.mark()))

    def expect(self, receivers: int) -> None:
        """Only so many of those that the ring was made for will read it."""
        self._sequence.expect(receivers)

    def advance(self) -> int:
        """Publish every bucket whose copies are complete."""
        while self._in_flight and self._in_flight[0][1].reached():
            self._sequence.published = self._in_flight.popleft()[0]
        return self._sequence.published

    def done(self) -> int:
        """The slowest receiver."""
        return self._sequence.done()

    def trace(self) -> StreamTimer | None:
        """Time the copies of the following buckets."""
        self._timer = self._buffer.timer()
        return self._timer

    def close(self) -> None:
        """Give ring and numbers back."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._in_flight.clear()
        self._buffer.close()
        self._sequence.close()


class IpcRingReader:
    """A rank's side. See `transport.base.RingReader`."""

    def __init__(self, offer: RingOffer, *, receiver: int, receivers: int, device_index: int) -> None:
        self._receiver = receiver
        self._sequence = SequenceBlock.open(Path(offer.control_path), receivers)
        try:
            self._buffer: MappedBuffer = device_of(offer.device).map(offer.handle, offer.size_bytes, device_index)
        except BaseException:
            self._sequence.close()
            raise
        self._in_use: deque[tuple[int, Mark]] = deque()

    def published(self) -> int:
        """What the owner published; also frees what this rank's device is done with."""
        self._drain()
        return self._sequence.published

    def view(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Bytes of the ring."""
        return self._buffer.view(offset_bytes, size_bytes)

    def release(self, seq: int) -> None:
        """Tell the owner, as soon as this rank's device has completed what it was given so far."""
        self._in_use.append((seq, self._buffer.mark()))
        self._drain()

    def drained(self) -> bool:
        """Whether this rank's device is done with all that was released."""
        self._drain()
        return not self._in_use

    def timer(self) -> StreamTimer | None:
        """Times this rank's device."""
        return self._buffer.timer()

    def close(self) -> None:
        """Unmap."""
        self._in_use.clear()
        self._buffer.close()
        self._sequence.close()

    def _drain(self) -> None:
        while self._in_use and self._in_use[0][1].reached():
            self._sequence.set_done(self._receiver, self._in_use.popleft()[0])
