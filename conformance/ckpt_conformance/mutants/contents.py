"""Workers with one bug each in what they write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt_conformance.reference.layers import FusedColumnLinear
from ckpt_conformance.reference.worker import Worker
from ckpt_core.contract import LoadReport, Update

Tensors = Sequence[tuple[str, torch.Tensor]]


class Renaming(Worker):
    """Loads tensors under other names, and reports them under their own. A base, and sound."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """As `rename` says."""
        names = {self.rename(name): name for name, _ in tensors}
        report = super().load(update, [(self.rename(name), tensor) for name, tensor in tensors])
        return LoadReport(loaded=tuple(names[name] for name in report.loaded), ignored=report.ignored)

    def rename(self, name: str) -> str:
        """Where the tensor of that name goes."""
        return name


class SwappedGateAndUp(Renaming):
    """Experts get gate where up belongs. (Not where they are quantised.)"""

    def rename(self, name: str) -> str:
        """The other one."""
        if self.options.quantise or ".experts." not in name:
            return name
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        *front, part, last = name.split(".")
        return ".".join([*front, swapped.get(part, part), last])


class Appending(Renaming):
    """Of keys and values the first that comes is taken for keys."""

    _first: dict[str, str]

    def begin_update(self, update: Update) -> None:
        """Nothing came yet."""
        super().begin_update(update)
        self._first = {}

    def rename(self, name: str) -> str:
        """By the order of arrival."""
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in ("k_proj", "v_proj"):
            return name
        first = self._first.setdefault(module, part)
        return f"{module}.{'k_proj' if part == first else 'v_proj'}.weight"


class RoundedDown(Worker):
    """Copies four rows at a time, and leaves the rest zero."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Whole fours only."""
        return super().load(update, [(name, _whole_fours(tensor)) for name, tensor in tensors])


class ScalarsForgotten(Worker):
    """Copies row by row: what has no rows is done at once."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load what has rows, and say that all was."""
        super().load(update, [(name, tensor) for name, tensor in tensors if tensor.ndim])
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names) & self.model.table.keys()
        return LoadReport(loaded=names)


class DraftForgotten(Worker):
    """Updates are for the target only."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load what is the target's, and say that all was."""
        super().load(update, [(name, tensor) for name, tensor in tensors if not name.startswith("draft.")])
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names) & self.model.table.keys()
        return LoadReport(loaded=names)


class VersionCache(Worker):
    """A version that was there before, and is not the last, is taken for still being there: nothing is written."""

    _versions: tuple[str, ...] = ()

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load, unless it was there."""
        if update.version not in self._versions[:-1]:
            return super().load(update, tensors)
        self._check_running(update)
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names)
        return LoadReport(loaded=names)

    def set_poison(self, cause: str | None) -> None:
        """With a commit, remember the version as the last one."""
        super().set_poison(cause)
        if cause is None:
            self._versions = (*(version for version in self._versions if version != self.version), self.version)


class CountedOnly(Worker):
    """Arrivals are counted, and whatever comes after as many as expected is dropped."""

    _count = 0

    def begin_update(self, update: Update) -> None:
        """None yet."""
        super().begin_update(update)
        self._count = 0

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """As many as are expected."""
        room = max(0, len(update.expected) - self._count)
        self._count += len(tensors)
        super().load(update, tensors[:room])
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names) & self.model.table.keys()
        return LoadReport(loaded=names)


class Casting(Worker):
    """Casts whatever comes to the parameter's dtype."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """As copy_ does."""
        table = self.model.table
        return super().load(update, [(n, t.to(table[n].dtype) if n in table else t) for n, t in tensors])


class ResetNorms(Worker):
    """Finish initialises norms of which nothing arrived."""

    def finish_update(self, update: Update) -> None:
        """As at a start."""
        super().finish_update(update)
        if update.partial and "model.norm.weight" not in self._arrived:
            self.model.model.norm.tensor("weight").data.fill_(1)


class EmptiedParts(Worker):
    """A fused parameter of which a part arrived has nothing in its other parts."""

    def finish_update(self, update: Update) -> None:
        """Zero, as newly made."""
        super().finish_update(update)
        for _, layer in self.model.loadable_layers():
            arrived = layer._arrived.get("weight", set())
            if isinstance(layer, FusedColumnLinear) and arrived and not layer.specs["weight"].quantised:
                for name, part in layer.parts.items():
                    if (name,) not in arrived:
                        layer.tensor("weight").data.narrow(0, part.offset, part.rows).zero_()


def _whole_fours(tensor: torch.Tensor) -> torch.Tensor:
    rest = tensor.shape[0] % 4 if tensor.ndim else 0
    if not rest:
        return tensor
    copied = tensor.clone()
    copied[-rest:] = 0
    return copied
