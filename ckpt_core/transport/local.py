"""Within one process: a ring in plain memory, with delays and failures on demand. For tests of everything above it.

A ring is shared by a `LocalRingWriter` and its `LocalRingReader`s, usually in threads. `Faults` says what goes wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ckpt_core.device import DevicePart, HostBytes
from ckpt_core.errors import PeerLost
from ckpt_core.plan import Step
from ckpt_core.wire import RingOffer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong on a ring. Numbers are seqs of the ring.

    Attributes:
        hold: bucket not published before the event is set.
        flip: offset in the bucket of a byte to invert after the copy.
        drop: buckets whose bytes are not copied (the number is published all the same).
        lose_at: from this seq on, every call of the writer raises PeerLost.
        early: buckets published before their bytes are there: the copy happens when the next call comes.
    """

    hold: Mapping[int, threading.Event] = field(default_factory=dict)
    flip: Mapping[int, int] = field(default_factory=dict)
    drop: frozenset[int] = frozenset()
    lose_at: int | None = None
    early: frozenset[int] = frozenset()


class LocalRing:
    """Memory and numbers that both sides share."""

    def __init__(self, *, owner: int, receivers: int, ring_bytes: int) -> None:
        self.owner = owner
        self.bytes = np.zeros(ring_bytes, dtype=np.uint8)
        self.published = 0
        self.done = [0] * receivers


class LocalRingWriter:
    """The agent's side. See `transport.base.RingWriter`."""

    def __init__(self, ring: LocalRing, faults: Faults | None = None) -> None:
        self._ring = ring
        self._faults = faults or Faults()
        self._filled: list[int] = []
        self._late: list[tuple[int, list[tuple[int, HostBytes | DevicePart]]]] = []

    def offer(self) -> RingOffer:
        """An offer that only this process could map."""
        size = self._ring.bytes.size
        return RingOffer(owner=self._ring.owner, device="local", handle="", size_bytes=size, control_path="")

    def fill(self, step: Step, parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        """Copy, unless a fault says otherwise."""
        self._check_lost(step.seq)
        self._copy_late()
        if step.seq in self._faults.early:
            self._late.append((step.ring_offset_bytes, parts))
        elif step.seq not in self._faults.drop:
            self._copy(step.ring_offset_bytes, parts)
        if (offset := self._faults.flip.get(step.seq)) is not None:
            self._ring.bytes[step.ring_offset_bytes + offset] ^= 0xFF
        self._filled.append(step.seq)

    def advance(self) -> int:
        """Publish what is not held back."""
        self._check_lost(self._ring.published + 1)
        while self._filled and self._may_publish(self._filled[0]):
            self._ring.published = self._filled.pop(0)
        return self._ring.published

    def done(self) -> int:
        """The slowest receiver."""
        return min(self._ring.done, default=self._ring.published)

    def trace(self) -> None:
        """None: plain memory has no clock of its own."""

    def close(self) -> None:
        """Nothing to give back."""
        self._filled.clear()

    def _may_publish(self, seq: int) -> bool:
        gate = self._faults.hold.get(seq)
        return gate is None or gate.is_set()

    def _check_lost(self, seq: int) -> None:
        if self._faults.lose_at is not None and seq >= self._faults.lose_at:
            raise PeerLost(f"agent {self._ring.owner} was told to fail at bucket {seq}")

    def _copy(self, base: int, parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        for offset, source in parts:
            assert not isinstance(source, DevicePart), "a ring in plain memory takes plain memory"
            self._ring.bytes[base + offset : base + offset + source.size].reshape(source.shape)[...] = source

    def _copy_late(self) -> None:
        for base, parts in self._late:
            self._copy(base, parts)
        self._late.clear()


class LocalRingReader:
    """A rank's side. See `transport.base.RingReader`."""

    def __init__(self, ring: LocalRing, *, receiver: int) -> None:
        import torch

        self._ring = ring
        self._receiver = receiver
        self._bytes = torch.from_numpy(ring.bytes)

    def published(self) -> int:
        """What the owner published."""
        return self._ring.published

    def view(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Bytes of the ring."""
        return self._bytes[offset_bytes : offset_bytes + size_bytes]

    def release(self, seq: int) -> None:
        """This rank is done with everything up to seq."""
        self._ring.done[self._receiver] = seq

    def drained(self) -> bool:
        """Always: there is no device to wait for."""
        return True

    def timer(self) -> None:
        """None: plain memory has no clock of its own."""

    def close(self) -> None:
        """Nothing to unmap."""
