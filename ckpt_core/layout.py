"""The slices of a checkpoint that one rank needs, and the algebra of boxes they are made of. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangular part of a tensor: `start[d] <= index[d] < start[d] + shape[d]` in every dimension d."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutEntry:
    """A slice that a rank needs.

    Attributes:
        tensor: name in the checkpoint.
        box: the part; None for the whole tensor.
        group: module whose tensors must land together; "" where it does not matter.
        cut: the plugin takes this slice in several parts (else it comes in one bucket).
    """

    tensor: str
    box: Box | None = None
    group: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A checkpoint tensor that does not fit the parameter it is for."""

    tensor: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What one rank needs of a checkpoint, and how the two do not fit. The session decides what to do about it.

    Attributes:
        entries: needed slices, in the order the engine likes best.
        missing: names the engine needs and the checkpoint lacks.
        unknown: names in the checkpoint that the engine does not know.
        mismatched: wrong shape or dtype.
        retained_bytes: peak bytes the engine retains, per group.
    """

    entries: tuple[LayoutEntry, ...]
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    retained_bytes: Mapping[str, int] = field(default_factory=dict)
