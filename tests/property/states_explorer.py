"""Stateless search: a run is replayed from the list of its choices; every other choice at every point is another run."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

Script = tuple[tuple[int, str], ...]  # choices that are not the first one, by the number of their point
SECOND_PHASES = frozenset({"undo", "go back", "serve", "recover"})
_ALIKE = re.compile(r"rank 1|agent 1|before: \w+ to agent 1|before: spawn")


@dataclass(frozen=True, slots=True)
class Point:
    """Where something else could have happened."""

    label: str
    options: tuple[str, ...]
    phase: str
    key: Hashable


@dataclass(slots=True)
class Chooser:
    """Says what happens: the first option, unless the script names another one.

    Attributes:
        points: all that were met.
        closed: no more faults.
    """

    script: dict[int, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    closed: bool = False
    _phase: str = "update"
    _key: Hashable = None

    def enter(self, phase: str, key: Hashable) -> None:
        """All that can happen from here on depends on the key alone."""
        self._phase, self._key = phase, (phase, key)

    def choose(self, label: str, *options: str) -> str:
        """One of these."""
        if self.closed:
            return options[0]
        number = len(self.points)
        self.points.append(Point(label, options, self._phase, self._key))
        picked = self.script.get(number, options[0])
        assert picked in options, f"replay went another way: point {number} {label} has no {picked!r}"
        return picked


def told(script: Script, points: list[Point]) -> str:
    """A script for people."""
    return "; ".join(f"{points[number].label} -> {picked}" for number, picked in script) or "no fault"


def explore(run: Callable[[Script], list[Point]], *, pairs: bool, every: bool = False) -> Iterator[Script]:
    """All runs with one fault, and those with a second one in a later phase, from each state that begins such a phase once.

    Args:
        every: second faults also of those whose turn is as good as another one's: states are told apart up to names.
    """
    points = run(())
    yield ()
    seen: set[Hashable] = set()
    for number, picked in _others(points, -1):
        first: Script = ((number, picked),)
        after = run(first)
        yield first
        if not pairs:
            continue
        new = {point.key for point in after[number + 1 :] if point.phase in SECOND_PHASES} - seen
        seen |= new
        for second in _others(after, number):
            point = after[second[0]]
            if point.key in new and (every or not _ALIKE.match(point.label)):
                script = (*first, second)
                run(script)
                yield script


def _others(points: list[Point], after: int) -> Iterator[tuple[int, str]]:
    for number, point in enumerate(points):
        if number > after:
            yield from ((number, option) for option in point.options[1:])
