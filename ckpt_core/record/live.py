"""Where what a rank takes lies in live parameters after a replay, so that it can be compared there.

A part whose elements follow each other there, in order, is compared in place. One that a loader turned or cut is put together
again first, one at a time. Not compared are parts that are converted, or of which some elements are not copied, or twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckpt_core.contract import LoadTensor
from ckpt_core.device_digest import Leaves
from ckpt_core.incoming import TakenPart
from ckpt_core.record.replay import Pull
from ckpt_core.strided import Strided
from ckpt_core.verify import Verifier


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Home:
    """Where a part of a bucket went.

    Attributes:
        pulls: copies of its piece, in elements of the piece, of which there are so many.
        in_place: it lies there as one run, in order.
    """

    bucket: int
    part: TakenPart
    pulls: tuple[Pull, ...]
    elements: int
    in_place: bool

    def packed(self) -> torch.Tensor:
        """The part as it was, put together from where it went."""
        first = self.pulls[0]
        piece = torch.empty(self.elements, dtype=first.dtype, device=first.destination.device)
        for pull in self.pulls:
            _region(piece, pull.source).copy_(pull.destination)
        return _region(piece, self.part.region).contiguous()

    def complete(self) -> bool:
        """Whether every element of the part is copied once, as it is."""
        dtype = self.pulls[0].dtype
        if any(pull.dtype != dtype or pull.destination.dtype != dtype for pull in self.pulls):
            return False
        if self.in_place:
            return True
        if any(_repeats(pull.source) for pull in self.pulls):
            return False
        taken = torch.zeros(self.elements, dtype=torch.uint8)
        for pull in self.pulls:
            _region(taken, pull.source).add_(1)
        return bool((_region(taken, self.part.region) == 1).all())


class LiveDigests:
    """Digests of parts as they live now. What lies in place is digested at once, the rest one by one.

    Attributes:
        homes: where the parts are.
    """

    def __init__(self, homes: Sequence[Home]) -> None:
        self.homes = list(homes)
        self._in_place = [home for home in homes if home.in_place]
        self._others = [home for home in homes if not home.in_place]
        self._leaves = Leaves([home.pulls[0].destination for home in self._in_place])

    def found(self) -> Iterator[tuple[Home, int]]:
        """Each home with its digest; those in place come first."""
        yield from zip(self._in_place, self._leaves.digests(), strict=True)
        for home in self._others:
            yield home, Leaves([home.packed()]).digests()[0]


class LiveHomes:
    """Of one replay and one plan. Worked out at their first update, used at all."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[LoadTensor, ...], dict[int, Home]]] = {}
        self._replayed: list[Home] = []
        self._digests = LiveDigests([])

    def begin(self) -> None:
        """A replay begins."""
        self._replayed = []

    def add(
        self, index: int, items: tuple[LoadTensor, ...], parts: Sequence[TakenPart], pulls: Sequence[Pull]
    ) -> frozenset[int]:
        """Bucket `index` is replayed by these copies. Numbers of the parts that can be compared where they live."""
        known, homes = self._known.get(index, ((), {}))
        if known is not items:
            homes = _homes(index, parts, pulls)
            self._known[index] = (items, homes)
        self._replayed += homes.values()
        return frozenset(homes)

    def check(self, verifier: Verifier) -> None:
        """Compare all that was replayed.

        Raises:
            VerificationError: a digest differs.
        """
        if self._replayed != self._digests.homes:
            self._digests = LiveDigests(self._replayed)
        for home, digest in self._digests.found():
            verifier.live(home.bucket, home.part, digest)


def _homes(bucket: int, parts: Sequence[TakenPart], pulls: Sequence[Pull]) -> dict[int, Home]:
    by_item: dict[int, list[Pull]] = {}
    for pull in pulls:
        by_item.setdefault(id(pull.item), []).append(pull)
    found = {}
    for part in parts:
        if mine := by_item.get(id(part.item)):
            home = home_of(bucket, part, mine)
            if home.complete():
                found[part.number] = home
    return found


def home_of(bucket: int, part: TakenPart, pulls: Sequence[Pull]) -> Home:
    """Where these copies of its piece put a part."""
    elements = max(pull.source.reach for pull in pulls)
    return Home(
        bucket=bucket,
        part=part,
        pulls=tuple(pulls),
        elements=max(elements, part.region.reach),
        in_place=_in_place(part, pulls),
    )


def _in_place(part: TakenPart, pulls: Sequence[Pull]) -> bool:
    first = pulls[0]
    same = first.source.collapsed() == part.region.collapsed()
    return len(pulls) == 1 and same and first.destination.is_contiguous()


def _repeats(region: Strided) -> bool:
    return any(n > 1 and stride == 0 for n, stride in zip(region.size, region.stride, strict=True))


def _region(whole: torch.Tensor, region: Strided) -> torch.Tensor:
    return whole.as_strided(region.size, region.stride, region.offset)
