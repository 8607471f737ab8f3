"""Which module of the engine a checkpoint tensor lands in, by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence


class Landing:
    """Of one model.

    Args:
        paths: of its modules.
        fused: last names of fused modules, with those of their parts in checkpoints.
    """

    def __init__(self, paths: Iterable[str], fused: Mapping[str, Sequence[str]]) -> None:
        self._paths = frozenset(paths)
        self._fused_of = {part: whole for whole, parts in fused.items() for part in parts}
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """Path of the module: the tensor's own, else the fused one, else the nearest above. "" for the model itself."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self._find(name.rpartition(".")[0])
        return found

    def by_module(self, names: Iterable[str]) -> dict[str, set[str]]:
        """Names by where they land."""
        found: dict[str, set[str]] = {}
        for name in names:
            found.setdefault(self.of(name), set()).add(name)
        return found

    def _find(self, path: str) -> str:
        while path and path not in self._paths:
            parent, _, leaf = path.rpartition(".")
            fused = f"{parent}.{self._fused_of[leaf]}" if leaf in self._fused_of else parent
            path = fused if fused in self._paths else parent
        return path


def is_below(path: str, tops: Collection[str]) -> bool:
    """Whether a module is one of these or inside one; "" is the model, which all are inside of."""
    return any(not top or path == top or path.startswith(f"{top}.") for top in tops)


def is_above(path: str, tops: Collection[str]) -> bool:
    """Whether a module has one of these inside it."""
    return any(not path or top.startswith(f"{path}.") for top in tops)
