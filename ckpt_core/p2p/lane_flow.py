"""Moves bytes between lanes until the busiest is as little busy as it can be, and proves that it is.

Bytes come in groups; a group may cross certain lanes; lanes have rates, and so have their parents (all NICs of an owner together).
For a given time this is a maximum flow from groups over lanes and parents. What matters of the groups is only how many bytes can go
from one lane to another, so paths are sought in a graph of lanes (Ford and Fulkerson 1956; shortest paths first: Edmonds and Karp
1972). Where no path is left, the lanes that were reached are a cut: the groups that can cross nothing else need at least their
bytes over the rate of these lanes. That is the next time to try, so it only grows, and it ends at the optimum of bytes that can be
divided at will (Newton's method for fractional programs: Dinkelbach 1967; for cuts: Cunningham 1985).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ckpt_core.routing.columns import Bools, Floats, Ints

MOST_BYTES = 1 << 52  # whole numbers are exact in floats up to here, and matrices of floats multiply fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Lanes of one side.

    Attributes:
        bytes_per_s: of each lane.
        parent: number of its parent.
        parent_bytes_per_s: of each parent; that of its lanes together where it has no limit.
    """

    bytes_per_s: Floats
    parent: Ints
    parent_bytes_per_s: Floats

    def __len__(self) -> int:
        return len(self.bytes_per_s)

    def rate(self, inside: Bools) -> float:
        """Bytes a second that some lanes carry together."""
        return float(np.minimum(self._by_parent(self.bytes_per_s * inside), self.parent_bytes_per_s).sum())

    def busiest_s(self, carried: Floats) -> float:
        """Time of the busiest lane or parent, for bytes by lane."""
        parents = self._by_parent(carried) / self.parent_bytes_per_s
        return max(float((carried / self.bytes_per_s).max(initial=0.0)), float(parents.max(initial=0.0)))

    def _by_parent(self, values: Floats) -> Floats:
        return np.bincount(self.parent, values, len(self.parent_bytes_per_s)).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Why it cannot be faster.

    Attributes:
        size_bytes: that must cross the lanes.
        bytes_per_s: that these carry together.
        lanes: which they are.
    """

    size_bytes: int
    bytes_per_s: float
    lanes: Bools

    @property
    def seconds(self) -> float:
        """The bound."""
        return self.size_bytes / self.bytes_per_s if self.size_bytes else 0.0


class _Step(NamedTuple):
    """From one place to the next: a lane, or behind all lanes a parent."""

    start: int
    end: int


class LaneFlow:
    """Bytes of groups on lanes.

    Attributes:
        on_lane: bytes by lane and group; whole numbers.
    """

    def __init__(self, allowed: Bools, on_lane: Floats, lanes: Lanes) -> None:
        """Begin with some distribution.

        Args:
            allowed: by lane and group: whether the group may cross the lane.
            on_lane: bytes by lane and group, where that is allowed.
        """
        assert on_lane.sum() < MOST_BYTES, "more bytes than can be counted exactly"
        self.on_lane = on_lane
        self._lanes = lanes
        self._allowed = allowed
        self._by_group = np.ascontiguousarray(allowed.T, dtype=np.float64)
        self._lane_count, places = len(lanes), len(lanes) + len(lanes.parent_bytes_per_s)
        # bytes that can go from place to place: lanes first, parents behind them
        self._room = np.zeros((places, places))
        self._room[: len(lanes), : len(lanes)] = on_lane @ self._by_group
        np.fill_diagonal(self._room, 0.0)
        self._over = np.zeros(len(lanes))
        self._left = np.zeros(places - len(lanes))

    def settle(self, seconds: float) -> Cut | None:
        """Move as little as it takes for no lane to be busy longer than this, or than any distribution must be.

        Bytes are not divided, so a lane may be above that by less than one, and the cut may be the worst but for one byte a lane.

        Returns:
            The cut that forbids less, where it is more than `seconds`.
        """
        cut = None
        while True:
            self._open(seconds)
            reached = self._push_all()
            if reached is None:
                return cut
            cut = self._cut(reached)
            seconds = max(cut.seconds, np.nextafter(seconds, np.inf))

    def _open(self, seconds: float) -> None:
        """Lanes let through what they can in this time; what is on a lane beyond that has to go elsewhere."""
        carried, lanes = self.on_lane.sum(axis=1), self._lanes
        through = np.minimum(carried, np.ceil(lanes.bytes_per_s * seconds))
        most = np.ceil(lanes.parent_bytes_per_s * seconds)
        for parent in np.flatnonzero(np.bincount(lanes.parent, through, len(most)) > most):
            members = np.flatnonzero(lanes.parent == parent)
            ends = np.minimum(np.cumsum(through[members]), most[parent])
            through[members] = np.diff(ends, prepend=0.0)
        self._over = carried - through
        self._left = most - np.bincount(lanes.parent, through, len(most))
        numbers = np.arange(self._lane_count)
        self._room[numbers, self._lane_count + lanes.parent] = np.ceil(lanes.bytes_per_s * seconds) - through
        self._room[self._lane_count + lanes.parent, numbers] = through

    def _push_all(self) -> Bools | None:
        """Until nothing is over, or nothing can go: then the places that were reached."""
        while self._over.any():
            came, last = self._search()
            if last is None:
                return came >= 0
            self._push(came, last)
        return None

    def _search(self) -> tuple[Ints, int | None]:
        """Shortest way from lanes that are over to a parent with room: where each place was reached from, itself for a start."""
        came = np.full(len(self._room), -1)
        frontier = np.flatnonzero(self._over)
        came[frontier] = frontier
        while len(frontier):
            parents = frontier[frontier >= self._lane_count]
            if len(parents):
                left = self._left[parents - self._lane_count]
                if left.any():
                    return came, int(parents[left.argmax()])
            room = self._room[frontier]
            fresh = np.flatnonzero((came < 0) & (room > 0).any(axis=0))
            came[fresh] = frontier[room[:, fresh].argmax(axis=0)]
            frontier = fresh
        return came, None

    def _push(self, came: Ints, last: int) -> None:
        """As much as can go along the way to the last place."""
        steps = []
        at = last
        while came[at] != at:
            steps.append(_Step(int(came[at]), at))
            at = int(came[at])
        rooms = [float(self._room[step]) for step in steps]
        size = min(*rooms, float(self._over[at]), float(self._left[last - self._lane_count]))
        self._over[at] -= size
        self._left[last - self._lane_count] -= size
        for step in steps:
            if max(step) < self._lane_count:
                self._shift(step, size)
            else:
                self._room[step] -= size
                self._room[step.end, step.start] += size

    def _shift(self, step: _Step, size: float) -> None:
        """Groups that may cross both lanes change over: those on both already first, then the large, so that few are cut."""
        source, target = self.on_lane[step.start], self.on_lane[step.end]
        groups = np.flatnonzero((source > 0) & self._allowed[step.end])
        groups = groups[np.lexsort((-source[groups], target[groups] == 0))]
        ends = np.minimum(np.cumsum(source[groups]), size)
        moved = np.diff(ends, prepend=0.0)
        groups, moved = groups[moved > 0], moved[moved > 0]
        source[groups] -= moved
        target[groups] += moved
        gone = moved @ self._by_group[groups]
        lanes = slice(0, self._lane_count)
        self._room[step.start, lanes] -= gone
        self._room[step.end, lanes] += gone
        self._room[step.start, step.start] = self._room[step.end, step.end] = 0.0

    def _cut(self, reached: Bools) -> Cut:
        inside = reached[: self._lane_count]
        bound = ~self._allowed[~inside].any(axis=0)
        size = int(self.on_lane[:, bound].sum())
        return Cut(size_bytes=size, bytes_per_s=self._lanes.rate(inside), lanes=inside)
