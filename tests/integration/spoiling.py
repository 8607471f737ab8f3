"""Corruption of a ring: for one plan and one rank, the bytes that it finds in a bucket in place of those that were sent.

All that is drawn comes from one seeded generator. What differs only in bytes that the rank does not take is no corruption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from ckpt_core.cpu import CpuDevice
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, Step
from ckpt_core.source import SourceIndex
from ckpt_core.staging import HostPool

Spoilt = dict[int, np.ndarray]  # all bytes of a bucket, by index of its step


class Bytes:
    """A checkpoint as it should arrive. Close it."""

    def __init__(self, index: SourceIndex) -> None:
        self.index = index
        self.manifest = Manifest.from_index(index)
        self.pool = HostPool(CpuDevice())
        self.pool.adopt(index)
        self.close = self.pool.close

    def of(self, step: Step) -> np.ndarray:
        """A whole bucket; zeros between its pieces."""
        found = np.zeros(step.bucket.size_bytes, np.uint8)
        for offset, part in self.pool.parts(self.manifest, step.bucket):
            found[offset : offset + part.size] = part.reshape(-1)
        return found


@dataclass(frozen=True, kw_only=True)
class Way:
    """What one rank takes by a plan."""

    plan: Plan
    receiver: int
    layout: Layout
    sent: Bytes
    steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        mine = [step for step in self.plan.steps if self.receiver in step.receivers]
        object.__setattr__(self, "steps", [step for step in mine if self.takes(step).any()])

    def takes(self, step: Step) -> np.ndarray:
        """Which bytes of the bucket. By the layout alone: not by the code under test."""
        found = np.zeros(step.bucket.size_bytes, bool)
        for piece in step.bucket.pieces:
            meta = self.sent.manifest.tensors[piece.tensor]
            wanted = np.zeros(meta.shape, bool)
            for entry in self.layout.entries:
                if entry.tensor == meta.name:
                    wanted[... if entry.box is None else entry.box.slices] = True
            part = wanted if piece.box is None else wanted[piece.box.slices]
            first, last = piece.offset_bytes, piece.offset_bytes + piece.size_bytes
            found[first:last] = np.repeat(part.reshape(-1), meta.dtype.itemsize)
        return found

    def hurt_by(self, spoilt: Spoilt) -> bool:
        """Whether any byte that the rank takes is another."""
        steps = [step for step in self.steps if step.index in spoilt]
        return any(((spoilt[step.index] != self.sent.of(step)) & self.takes(step)).any() for step in steps)

    def of_owner(self, step: Step) -> list[Step]:
        """All buckets of that ring."""
        return [other for other in self.plan.steps if other.owner == step.owner]


# -- kinds of corruption; None where this bucket cannot suffer it ------------------------------------------------------
def _flip(way: Way, rng: Random, step: Step) -> Spoilt | None:
    """One bit is another."""
    found = way.sent.of(step)
    found[rng.choice(np.flatnonzero(way.takes(step)))] ^= 1 << rng.randrange(8)
    return {step.index: found}


def _dropped(way: Way, _rng: Random, step: Step) -> Spoilt | None:
    """The ring keeps what was there before."""
    ring = np.zeros(way.plan.ring_bytes, np.uint8)
    for other in way.of_owner(step):
        if other.seq < step.seq:
            _lay(ring, other, way.sent.of(other))
    return {step.index: ring[step.ring_offset_bytes :][: step.bucket.size_bytes]}


def _repeated(way: Way, _rng: Random, step: Step) -> Spoilt | None:
    """The bucket before comes again in its place, as far as there is room."""
    if step.index == 0:
        return None
    return {step.index: _over(way.sent.of(step), way.sent.of(way.plan.steps[step.index - 1]), 0)}


def _swapped(way: Way, rng: Random, step: Step) -> Spoilt | None:
    """Two buckets of one size are in each other's place."""
    same = [other for other in way.steps if other.bucket.size_bytes == step.bucket.size_bytes and other is not step]
    if not same:
        return None
    other = rng.choice(same)
    return {step.index: way.sent.of(other), other.index: way.sent.of(step)}


def _early(way: Way, _rng: Random, step: Step) -> Spoilt | None:
    """The next bucket that gets its place in the ring is there before it was read."""
    first, last = step.ring_offset_bytes, step.ring_offset_bytes + step.bucket.size_bytes
    for other in way.of_owner(step):
        begin, end = other.ring_offset_bytes, other.ring_offset_bytes + other.bucket.size_bytes
        if other.seq > step.seq and begin < last and first < end:
            return {step.index: _over(way.sent.of(step), way.sent.of(other), begin - first)}
    return None


KINDS: dict[str, Callable[[Way, Random, Step], Spoilt | None]] = {
    "flip": _flip,
    "dropped": _dropped,
    "repeated": _repeated,
    "swapped": _swapped,
    "early": _early,
}


def spoil(kind: str, rng: Random, way: Way) -> Spoilt | None:
    """One corruption of that kind that hurts; None where this plan leaves no room for it."""
    for step in rng.sample(way.steps, len(way.steps)):
        found = KINDS[kind](way, rng, step)
        if found is not None and way.hurt_by(found):
            return found
    return None


def _lay(ring: np.ndarray, step: Step, data: np.ndarray) -> None:
    ring[step.ring_offset_bytes : step.ring_offset_bytes + data.size] = data


def _over(data: np.ndarray, other: np.ndarray, at: int) -> np.ndarray:
    """A bucket with another one over it, which begins there (maybe before it)."""
    found = data.copy()
    first, last = max(at, 0), min(at + other.size, data.size)
    found[first:last] = other[first - at : last - at]
    return found
