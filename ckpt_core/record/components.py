"""Which modules may be replayed: modules that share checkpoint tensors are replayed together or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt_core.record.recording import Recording, module_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """Attributes:
    roots: checkpoint tensors that go nowhere else.
    parameters: that they fill, whole.
    why_not: why only the engine's loader may fill them; empty where a proof is all that is missing.
    """

    roots: frozenset[str]
    parameters: frozenset[str]
    why_not: str = ""


def components(
    recording: Recording, sizes: Mapping[str, int], excluded: Mapping[str, str], *, partly: bool = False
) -> tuple[Component, ...]:
    """Group what a recording found.

    Args:
        sizes: elements of each live parameter, by name.
        excluded: modules that are not as the loader left them, with the reason.
        partly: that a parameter is filled in part is no reason.
    """
    joined = _Joined()
    for copy in recording.copies:
        joined.join(copy.root, module_of(copy.parameter))
    for root, reached in recording.reaches.items():
        for parameter in reached:
            joined.join(root, module_of(parameter))
    parameters: dict[str, set[str]] = {}
    for copy in recording.copies:
        parameters.setdefault(joined.name_of(copy.root), set()).add(copy.parameter)
    reasons: dict[str, str] = {}
    for root, why in recording.opaque.items():
        reasons.setdefault(joined.name_of(root), f"{root}: {why}")
    if "" in recording.reaches:  # plain writes that are no constants
        reasons.setdefault(joined.name_of(""), "the loader writes computed values")
    for name, misfit in _badly_covered(recording, sizes, partly=partly).items():
        reasons.setdefault(joined.name_of_module(module_of(name)), f"{name}: {misfit}")
    for module, why in excluded.items():
        reasons.setdefault(joined.name_of_module(module), f"{module}: {why}")
    return tuple(
        Component(roots=frozenset(roots), parameters=frozenset(parameters.get(name, ())), why_not=reasons.get(name, ""))
        for name, roots in joined.roots().items()
    )


def _badly_covered(recording: Recording, sizes: Mapping[str, int], *, partly: bool) -> dict[str, str]:
    covered: dict[str, int] = {}
    for copy in recording.copies:
        covered[copy.parameter] = covered.get(copy.parameter, 0) + copy.destination.numel
    for fill in recording.fills:
        covered[fill.parameter] = covered.get(fill.parameter, 0) + fill.destination.numel
    return {
        name: f"{count} of {sizes.get(name, 'no')} elements are written"
        for name, count in covered.items()
        if count != sizes.get(name) and not (partly and count < sizes.get(name, 0))
    }


class _Joined:
    """Union-find over checkpoint tensors and modules."""

    def __init__(self) -> None:
        self._above: dict[tuple[str, str], tuple[str, str]] = {}

    def join(self, root: str, module: str) -> None:
        self._above[self._top(("root", root))] = self._top(("module", module))

    def name_of(self, root: str) -> str:
        """Of the component of a checkpoint tensor."""
        return "/".join(self._top(("root", root)))

    def name_of_module(self, module: str) -> str:
        return "/".join(self._top(("module", module)))

    def roots(self) -> dict[str, list[str]]:
        """Checkpoint tensors by component."""
        found: dict[str, list[str]] = {}
        for kind, name in list(self._above):
            if kind == "root" and name:
                found.setdefault(self.name_of(name), []).append(name)
        return found

    def _top(self, node: tuple[str, str]) -> tuple[str, str]:
        self._above.setdefault(node, node)
        while self._above[node] != node:
            self._above[node] = self._above[self._above[node]]
            node = self._above[node]
        return node
