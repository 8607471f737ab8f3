"""The slices of a checkpoint that one rank needs, and the algebra of boxes they are made of. No torch.

Boxes are sets of indexes: an empty box is inside every box and meets none. A scalar's box has no dimension
and one element. Prior art for slice algebra apart from any transport: torchstore's TensorSlice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ckpt_core.errors import CoverageError
from ckpt_core.manifest import Manifest

_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRuns:
    """Contiguous runs of bytes that a box occupies in a row-major tensor, in ascending order.

    Attributes:
        count: number of runs.
        first_offset_bytes: of the first run, from the start of the tensor.
        run_bytes: length, the same for all.
        outer_shape, outer_strides_bytes: where the runs begin: first_offset_bytes plus any index in
            `outer_shape` times the strides.
    """

    count: int
    first_offset_bytes: int
    run_bytes: int
    outer_shape: tuple[int, ...]
    outer_strides_bytes: tuple[int, ...]

    def offsets_bytes(self) -> Iterator[int]:
        """Offset of each run from the start of the tensor."""
        if self.count == 0:
            return
        for indexes in itertools.product(*map(range, self.outer_shape)):
            yield self.first_offset_bytes + sum(map(int.__mul__, indexes, self.outer_strides_bytes))


class Box(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A rectangular part of a tensor: `start[d] <= index[d] < start[d] + shape[d]` in every dimension d."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of that shape."""
        return cls(start=(0,) * len(shape), shape=tuple(shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """First index behind the box, in each dimension."""
        return tuple(map(int.__add__, self.start, self.shape))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that takes this box out of a numpy array or torch tensor."""
        return tuple(map(slice, self.start, self.stop))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is a well-formed part of a tensor of that shape."""
        return (
            len(self.start) == len(self.shape) == len(shape)
            and all(start >= 0 and extent >= 0 for start, extent in zip(self.start, self.shape, strict=True))
            and all(stop <= extent for stop, extent in zip(self.stop, shape, strict=True))
        )

    def disjoint(self, other: Box) -> bool:
        """Whether the two share no element."""
        assert len(self.shape) == len(other.shape), (self, other)
        # A plain loop: planning calls this a million times.
        for a, size_a, b, size_b in zip(self.start, self.shape, other.start, other.shape, strict=True):
            if not size_a or not size_b or a + size_a <= b or b + size_b <= a:
                return True
        return False

    def intersect(self, other: Box) -> Box | None:
        """The part in both; None where there is no element in both."""
        if self.disjoint(other):
            return None
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start=start, shape=tuple(map(int.__sub__, stop, start)))

    def contains(self, other: Box) -> bool:
        """Whether every element of the other is in this one."""
        assert len(self.shape) == len(other.shape), (self, other)
        if other.size == 0:
            return True
        above = all(mine <= its for mine, its in zip(self.start, other.start, strict=True))
        return above and all(mine >= its for mine, its in zip(self.stop, other.stop, strict=True))

    def subtract(self, other: Box) -> list[Box]:
        """Disjoint boxes, at most two a dimension, of the elements that are not in the other."""
        common = self.intersect(other)
        if common is None:
            return [self] if self.size else []
        parts = []
        start, shape = list(self.start), list(self.shape)
        for d, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
            end = start[d] + shape[d]
            for begin, extent in ((start[d], low - start[d]), (high, end - high)):
                if extent:
                    part_start = (*start[:d], begin, *start[d + 1 :])
                    parts.append(Box(start=part_start, shape=(*shape[:d], extent, *shape[d + 1 :])))
            start[d], shape[d] = low, high - low
        return parts

    def relative_to(self, other: Box) -> Box:
        """The same elements, counted from the start of a box that contains them."""
        assert other.contains(self), (self, other)
        return Box(start=tuple(map(int.__sub__, self.start, other.start)), shape=self.shape)

    def byte_runs(self, shape: Sequence[int], itemsize: int) -> ByteRuns:
        """Where its bytes are in a row-major tensor of that shape."""
        assert self.fits(shape), (self, shape)
        strides = _strides_bytes(shape, itemsize)
        inner = len(shape)
        while inner > 0 and self.shape[inner - 1] == shape[inner - 1]:
            inner -= 1
        outer = max(0, inner - 1)
        count = math.prod(self.shape[:outer]) if self.size else 0
        return ByteRuns(
            count=count,
            first_offset_bytes=sum(map(int.__mul__, self.start, strides)) if count else 0,
            run_bytes=math.prod(self.shape[outer:]) * itemsize if count else 0,
            outer_shape=self.shape[:outer],
            outer_strides_bytes=strides[:outer],
        )

    def is_contiguous_in(self, shape: Sequence[int]) -> bool:
        """Whether it is one run of bytes (or none) in a row-major tensor of that shape."""
        return self.byte_runs(shape, 1).count <= 1

    def split_rows(self, max_bytes: int, itemsize: int) -> list[Box]:
        """Cut into parts of at most that many bytes, in row-major order and of about the same size.

        Along dimension 0; a row that is larger itself is cut along the next dimension, and so on. A single
        element is never cut.
        """
        if not self.shape or self.size * itemsize <= max_bytes:
            return [self]
        row_bytes = math.prod(self.shape[1:]) * itemsize
        rows_most = max(1, max_bytes // row_bytes)
        rows = -(-self.shape[0] // -(-self.shape[0] // rows_most))
        cuts = [self._rows(row, min(rows, self.shape[0] - row)) for row in range(0, self.shape[0], rows)]
        if row_bytes <= max_bytes:
            return cuts
        return [part for cut in cuts for part in cut._split_inside_row(max_bytes, itemsize)]

    def _rows(self, first: int, count: int) -> Box:
        return Box(start=(self.start[0] + first, *self.start[1:]), shape=(count, *self.shape[1:]))

    def _split_inside_row(self, max_bytes: int, itemsize: int) -> list[Box]:
        row = Box(start=self.start[1:], shape=self.shape[1:])
        return [
            Box(start=(self.start[0], *part.start), shape=(1, *part.shape))
            for part in row.split_rows(max_bytes, itemsize)
        ]


def _strides_bytes(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides = itertools.accumulate(reversed(shape[1:]), int.__mul__, initial=itemsize)
    return tuple(strides)[::-1] if shape else ()


def covers(boxes: Iterable[Box], box: Box) -> bool:
    """Whether every element of `box` is in at least one of `boxes`."""
    left = [box] if box.size else []
    for other in boxes:
        if not left:
            break
        left = [part for piece in left for part in piece.subtract(other)]
    return not left


def joined(boxes: Iterable[Box]) -> Iterator[Box]:
    """The same elements in fewer boxes, where neighbours follow each other along dimension 0."""
    last: Box | None = None
    for box in boxes:
        if last is not None and _follows(last, box):
            last = Box(start=last.start, shape=(last.shape[0] + box.shape[0], *last.shape[1:]))
            continue
        if last is not None:
            yield last
        last = box
    if last is not None:
        yield last


def _follows(box: Box, other: Box) -> bool:
    return (
        bool(box.shape)
        and box.start[0] + box.shape[0] == other.start[0]
        and box.shape[1:] == other.shape[1:]
        and box.start[1:] == other.start[1:]
    )


def all_disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no element is in two of them."""
    return all(a.disjoint(b) for a, b in itertools.combinations(boxes, 2))


class LayoutEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
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
    """What one rank needs of a checkpoint, and how the two do not fit. The session decides what to do.

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


def whole_layout(manifest: Manifest) -> Layout:
    """Every tensor whole, grouped by its module: what an engine without a layout of its own gets."""
    return Layout(
        entries=tuple(
            LayoutEntry(tensor=tensor.name, group=tensor.name.rpartition(".")[0]) for tensor in manifest.tensors
        )
    )


def check_coverage(
    layouts: Mapping[str, Layout],
    *,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    manifest: Manifest | None = None,
) -> None:
    """Check that checkpoint and engines fit each other.

    Args:
        layouts: by a label of the rank, as a message should name it.
        allow_missing: engines may need tensors that the checkpoint lacks; those keep their old values.
        allow_unexpected: the checkpoint may have tensors that engines do not know.
        manifest: the checkpoint; with it, slices that are not inside its tensors are found too.

    Raises:
        CoverageError: names (the first 8, then a count), ranks, expected and got, and what to do.
    """
    problems = _mismatches(layouts)
    if not allow_missing:
        missing = _ranks_by_name((label, layout.missing) for label, layout in layouts.items())
        problems += _summary(missing, "missing in the checkpoint", "pass --allow-missing to leave them as they are")
    if not allow_unexpected:
        unknown = _ranks_by_name((label, layout.unknown) for label, layout in layouts.items())
        problems += _summary(unknown, "not known to the engine", "pass --allow-unexpected to leave them out")
    if manifest is not None:
        problems += _outside(layouts, manifest)
    if problems:
        raise CoverageError("checkpoint and engine do not fit:\n" + "\n".join(problems))


def box_of(entry: LayoutEntry, shape: tuple[int, ...]) -> Box:
    """The part that an entry needs of a tensor of that shape.

    Raises:
        CoverageError: it is not inside the tensor.
    """
    if entry.box is None:
        return Box.whole(shape)
    if not entry.box.fits(shape):
        raise CoverageError(
            f"tensor {entry.tensor!r}: expected a slice inside {list(shape)}, "
            f"got start {list(entry.box.start)} shape {list(entry.box.shape)}; "
            "the layout was not made for this checkpoint"
        )
    return entry.box


def _mismatches(layouts: Mapping[str, Layout]) -> list[str]:
    found: dict[Mismatch, list[str]] = {}
    for label, layout in layouts.items():
        for mismatch in layout.mismatched:
            found.setdefault(mismatch, []).append(label)
    by_text = {f"{m.tensor!r} (expected {m.expected}, got {m.got})": ranks for m, ranks in found.items()}
    return _summary(by_text, "of the wrong shape or dtype", "use a checkpoint of the model that the engine runs")


def _outside(layouts: Mapping[str, Layout], manifest: Manifest) -> list[str]:
    outside: dict[str, list[str]] = {}
    for label, layout in layouts.items():
        for entry in layout.entries:
            text = _misfit(entry, manifest)
            if text:
                outside.setdefault(text, []).append(label)
    return _summary(outside, "needed but not there", "the layout was not made for this checkpoint: attach again")


def _misfit(entry: LayoutEntry, manifest: Manifest) -> str:
    if entry.tensor not in manifest:
        return f"{entry.tensor!r} (expected in the checkpoint, got nothing)"
    shape = manifest.tensors[manifest.index_of(entry.tensor)].shape
    if entry.box is None or entry.box.fits(shape):
        return ""
    got = f"start {list(entry.box.start)} shape {list(entry.box.shape)}"
    return f"{entry.tensor!r} (expected a slice inside {list(shape)}, got {got})"


def _ranks_by_name(names_by_rank: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, list[str]]:
    ranks: dict[str, list[str]] = {}
    for label, names in names_by_rank:
        for name in names:
            ranks.setdefault(repr(name), []).append(label)
    return ranks


def _summary(ranks_by_text: Mapping[str, list[str]], what: str, remedy: str) -> list[str]:
    if not ranks_by_text:
        return []
    shown = list(ranks_by_text)[:_NAMES_SHOWN]
    ranks = list(dict.fromkeys(rank for text in shown for rank in ranks_by_text[text]))
    names = ", ".join(shown) + _and_more(len(ranks_by_text) - len(shown))
    where = ", ".join(ranks[:_NAMES_SHOWN]) + _and_more(len(ranks) - _NAMES_SHOWN)
    plural = "" if len(ranks_by_text) == 1 else "s"
    return [f"{len(ranks_by_text)} tensor{plural} {what} (on {where}): {names}; {remedy}"]


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
