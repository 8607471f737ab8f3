"""Spreads ranges of bytes over lanes: whole where that is even enough, cut where it is not."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ckpt_core.p2p.lane_flow import Cut, LaneFlow, Lanes
from ckpt_core.routing.columns import Bools, Floats, Ints, ints

_MOST_TRIES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """What is to be spread, in order.

    Attributes:
        size_bytes: of each range.
        group: number of its group: those that may cross the same lanes.
        allowed: by lane and group.
    """

    size_bytes: Ints
    group: Ints
    allowed: Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Where they go: columns, one place a part of a range; those of one range are in order and without gaps.

    Attributes:
        range_number, start_bytes, size_bytes: which range, and what of it.
        lane: that carries it.
    """

    range_number: Ints
    start_bytes: Ints
    size_bytes: Ints
    lane: Ints


def least_seconds(ranges: Ranges, lanes: Lanes) -> Cut | None:
    """What no distribution of these bytes can beat, even if they are divided at will; None where there are no bytes."""
    first = ranges.allowed.argmax(axis=0)[ranges.group]
    return LaneFlow(ranges.allowed, _carried(ranges, first), lanes).settle(0.0)


def spread(ranges: Ranges, lanes: Lanes, *, seconds: float, unit_bytes: int) -> tuple[Parts, Cut | None]:
    """Give each range a lane, or several, so that no lane takes longer than it must.

    In order, each range goes to the lane that is the least busy so far (list scheduling, Graham 1966): lanes are even at every
    point, not only at the end. What is then too much somewhere is moved by `LaneFlow`: the last ranges of a lane first, and
    one cut where a whole one is too much.

    Args:
        seconds: lanes that take no longer are left as they are.
        unit_bytes: parts of a range begin at multiples of this.

    Returns:
        The parts, and the cut where more than `seconds` are needed.
    """
    lane = deal(ranges, lanes.bytes_per_s)
    before = _carried(ranges, lane)
    flow = LaneFlow(ranges.allowed, before.copy(), lanes)
    cut = flow.settle(seconds)
    return _moved(ranges, lane, flow.on_lane - before, unit_bytes), cut


def deal(ranges: Ranges, bytes_per_s: Floats) -> Ints:
    """Lane of each range: whole, and in order.

    A group's lanes lie in a heap by the time that each was busy when the group last looked: that only grows, so the first of the
    heap is the least busy one as soon as its time is up to date.
    """
    heaps = [[(0.0, lane) for lane in np.flatnonzero(column).tolist()] for column in ranges.allowed.T]
    cost = (1 / bytes_per_s).tolist()
    busy = [0.0] * len(cost)
    dealt = []
    for size, group in zip(ranges.size_bytes.tolist(), ranges.group.tolist(), strict=True):
        heap = heaps[group]
        seen, lane = heap[0]
        while seen < busy[lane]:
            heapq.heapreplace(heap, (busy[lane], lane))
            seen, lane = heap[0]
        busy[lane] = seen + size * cost[lane]
        heapq.heapreplace(heap, (busy[lane], lane))
        dealt.append(lane)
    return ints(dealt)


def _carried(ranges: Ranges, lane: Ints) -> Floats:
    """Bytes by lane and group."""
    shape = ranges.allowed.shape
    key = lane * shape[1] + ranges.group
    return np.bincount(key, ranges.size_bytes, shape[0] * shape[1]).astype(np.float64).reshape(shape)


def _moved(ranges: Ranges, lane: Ints, change: Floats, unit_bytes: int) -> Parts:
    """Carry out a change of bytes by lane and group."""
    mover = _Mover(ranges, lane, unit_bytes)
    for group in np.flatnonzero(change.any(axis=0)).tolist():
        mover.move(group, change[:, group])
    return mover.parts()


class _Mover:
    """Takes ranges off lanes and puts them on others: whole, or their ends.

    Cuts lie at units, so a lane gets a little more or less than it should: what is owed to it is made good in the next group.
    """

    def __init__(self, ranges: Ranges, lane: Ints, unit_bytes: int) -> None:
        self._size, self._lane = ranges.size_bytes.copy(), lane.copy()
        self._unit_bytes, self._groups = unit_bytes, ranges.allowed.shape[1]
        self._owed = np.zeros(ranges.allowed.shape[0])
        self._ends: list[tuple[int, int, int, int]] = []  # as the columns of Parts
        key = lane * self._groups + ranges.group
        self._order = np.argsort(key, kind="stable")
        self._keys = key[self._order]

    def move(self, group: int, change: Floats) -> None:
        """Change what the lanes carry of one group, as near as it can be."""
        lanes = np.flatnonzero(change).tolist()
        wanted = {lane: float(change[lane] + self._owed[lane]) for lane in lanes}
        takers = [lane for lane in lanes if wanted[lane] > 0]
        for lane in lanes:
            if wanted[lane] < 0:
                self._empty(lane, group, wanted, takers)
        for lane in lanes:
            self._owed[lane] = wanted[lane]

    def parts(self) -> Parts:
        """What came out."""
        numbers = np.arange(len(self._size))
        kept = np.stack([numbers, np.zeros_like(numbers), self._size, self._lane], axis=1)
        rows = np.concatenate([kept, ints(self._ends).reshape(-1, 4)])
        number, start, size, lane = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T
        return Parts(range_number=number, start_bytes=start, size_bytes=size, lane=lane)

    def _empty(self, giver: int, group: int, wanted: dict[int, float], takers: list[int]) -> None:
        """Move ranges of a group from one lane to those that want some, the last first."""
        in_vain = 0
        for number in self._on(giver, group):
            if wanted[giver] >= 0 or not takers or in_vain == _MOST_TRIES:
                return
            in_vain += not self._hand_out(number, giver, wanted, takers)

    def _hand_out(self, number: int, giver: int, wanted: dict[int, float], takers: list[int]) -> bool:
        """Move as much of one range as is wanted; whether that was anything."""
        moved = False
        while wanted[giver] < 0 and takers and self._lane[number] == giver:
            taker = takers[-1]
            size = self._take(number, min(-wanted[giver], wanted[taker]), taker)
            if not size and -wanted[giver] <= wanted[taker]:
                break  # the range cannot be cut so finely
            moved = moved or size > 0
            wanted[giver] += size
            wanted[taker] -= size
            if not size or wanted[taker] <= 0:
                takers.pop()
        return moved

    def _on(self, lane: int, group: int) -> list[int]:
        key = lane * self._groups + group
        first, last = np.searchsorted(self._keys, [key, key + 1])
        numbers: list[int] = self._order[first:last][::-1].tolist()
        return numbers

    def _take(self, number: int, size: float, taker: int) -> int:
        """Move the end of a range, about that large, or all of it; how large it was."""
        whole = int(self._size[number])
        keep = self._nearest_cut(whole, max(0.0, whole - size))
        if keep == 0:
            self._lane[number] = taker
        elif keep < whole:
            self._ends.append((number, keep, whole - keep, taker))
            self._size[number] = keep
        return whole - keep

    def _nearest_cut(self, whole: int, keep: float) -> int:
        below = int(keep) // self._unit_bytes * self._unit_bytes
        above = min(below + self._unit_bytes, whole)
        return below if keep - below < above - keep else above
