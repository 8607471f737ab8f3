"""What an engine's loader did with each checkpoint tensor: the result of `recorder.record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ckpt_core.layout import Box
from ckpt_core.strided import Strided


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A region of a checkpoint tensor that lands in a region of a parameter.

    Attributes:
        root: name of the checkpoint tensor; `source`: which of its elements, counted from its first.
        dtype: that the source is read as (of the same size as its own).
        parameter: path and name; `destination`: which of its elements, counted from its first.
    """

    root: str
    source: Strided
    dtype: torch.dtype
    parameter: str
    destination: Strided


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """A constant that the loader writes, e.g. into the padding of a vocabulary."""

    parameter: str
    destination: Strided
    value: float


@dataclass(frozen=True, kw_only=True)
class Recording:
    """All of it. No slots: cached_property needs a __dict__.

    Attributes:
        shapes: of the checkpoint's tensors.
        sizes_bytes: of the checkpoint's tensors.
        copies, fills: in the loader's order.
        opaque: tensors that only the loader itself can load, with the operation or the error that made them so.
        reaches: parameters that an opaque tensor was seen to land in.
        shared: parameters that are another's storage, with that one's name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    sizes_bytes: Mapping[str, int]
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    opaque: Mapping[str, str]
    reaches: Mapping[str, frozenset[str]]
    shared: Mapping[str, str]

    @cached_property
    def copies_of(self) -> dict[str, tuple[Copy, ...]]:
        """Copies by checkpoint tensor."""
        found: dict[str, list[Copy]] = {}
        for copy in self.copies:
            found.setdefault(copy.root, []).append(copy)
        return {name: tuple(copies) for name, copies in found.items()}

    @cached_property
    def written(self) -> frozenset[str]:
        """Parameters that the loader writes, as far as seen."""
        copied = {copy.parameter for copy in self.copies} | {fill.parameter for fill in self.fills}
        return frozenset(copied.union(*self.reaches.values()))

    @property
    def needed(self) -> frozenset[str]:
        """Checkpoint tensors that the loader takes anything of."""
        return frozenset(self.copies_of) | frozenset(self.opaque)

    @property
    def recorded_share(self) -> float:
        """Bytes of needed tensors that are pure copies, of all needed."""
        total = sum(self.sizes_bytes[name] for name in self.needed)
        pure = sum(self.sizes_bytes[name] for name in self.copies_of if name not in self.opaque)
        return pure / total if total else 0.0

    def boxes_of(self, name: str) -> tuple[Box, ...]:
        """Parts of a checkpoint tensor that are needed; overlapping ones where the loader reads elements twice."""
        shape = self.shapes[name]
        boxes = (copy.source.box_in(shape) for copy in self.copies_of.get(name, ()))
        return tuple(dict.fromkeys(boxes))


def module_of(parameter: str) -> str:
    """Path of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0]
