"""Packs what ranks need of a checkpoint into buckets: aligned contiguous bytes that travel as one.

A tensor goes whole, or, where every rank that needs it takes parts, in runs of rows that some rank needs.
Tensors of one group follow each other. Cut pieces are at most a quarter of a bucket, so that buckets fill
evenly: small or uneven ones cost a third of the speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import msgspec

from ckpt_core.dtypes import DType, size_bytes
from ckpt_core.errors import CapacityError
from ckpt_core.layout import Box, Layout, LayoutEntry, box_of
from ckpt_core.manifest import Manifest, TensorMeta

ALIGN_BYTES = 256
_PIECES_PER_BUCKET = 4
_DIGITS = re.compile(r"([0-9]+)")

_ComponentKey = tuple[str | tuple[int, str], ...]
NaturalKey = tuple[_ComponentKey, ...]


class Piece(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tensor, or a part of one, row-major in a bucket. Within one host parts are contiguous in the checkpoint, too.

    Attributes:
        tensor: its index in the manifest.
        box: the part; None for the whole tensor.
        offset_bytes: from the start of the bucket, aligned.
        size_bytes: without padding.
    """

    tensor: int
    box: Box | None
    offset_bytes: int
    size_bytes: int


class Bucket(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Bytes that travel as one. `size_bytes` is aligned (padding counts); `index` is the place in order."""

    index: int
    size_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is sent of a tensor in one piece (None: all), its bytes, and the bit set of those who need it."""

    box: Box | None
    size_bytes: int
    receivers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """All that decides how a tensor is cut and who gets what.

    Attributes:
        cut: whether everybody takes it in parts.
        whole: bit r is set where receiver r needs all of it.
        slices: receiver, and index in `Needs.boxes`, for those who need a part.
    """

    shape: tuple[int, ...]
    dtype: DType
    cut: bool
    whole: int
    slices: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What receivers need of a checkpoint.

    Models repeat a few shapes and slices a hundred thousand times, so boxes and patterns are kept once, and what
    follows from them is worked out once.

    Attributes:
        manifest: the checkpoint.
        receivers: number of layouts.
        groups: the first group that a layout names for each tensor, by index, in the order in which layouts first name them.
        patterns: and the tensors that have them.
        boxes: the different slices.
    """

    manifest: Manifest
    receivers: int
    groups: Mapping[int, str]
    patterns: Mapping[Pattern, list[int]]
    boxes: Sequence[Box]

    def bytes_by_receiver(self) -> tuple[int, ...]:
        """Bytes that each receiver needs; a byte that two of its slices share counts once."""
        total = [0] * self.receivers
        for pattern, indexes in self.patterns.items():
            for receiver in bits(pattern.whole):
                total[receiver] += size_bytes(pattern.shape, pattern.dtype) * len(indexes)
            boxes: dict[int, list[Box]] = {}
            for receiver, number in pattern.slices:
                if not pattern.whole >> receiver & 1:
                    boxes.setdefault(receiver, []).append(self.boxes[number])
            for receiver, parts in boxes.items():
                total[receiver] += _union_size(parts) * pattern.dtype.itemsize * len(indexes)
        return tuple(total)


_WHOLE, _NOTHING, _OUTSIDE = -1, -2, -3


def collect_needs(manifest: Manifest, layouts: Sequence[Layout]) -> Needs:
    """Merge layouts, one per receiver.

    Raises:
        ManifestError: a layout names a tensor that the checkpoint does not have.
        CoverageError: a slice is not inside its tensor.
    """
    numbers = _PartNumbers(manifest)
    columns = [_Column.of(layout, numbers) for layout in layouts]
    groups: dict[int, str] = {}
    for column in columns:
        groups |= {index: group for index, group in column.groups.items() if not groups.get(index)}
    uncut: set[int] = set().union(*(column.uncut for column in columns))
    # Engines stand still meanwhile: one row a tensor, without a call for each.
    rows = zip(*(map(column.parts.get, groups) for column in columns), strict=True)
    same: dict[tuple[int, bool, tuple[_Parts | None, ...]], list[int]] = {}
    for index, row in zip(groups, rows, strict=True):
        same.setdefault((manifest.kinds[index], index not in uncut, row), []).append(index)
    patterns: dict[Pattern, list[int]] = {}
    for (_, cut, row), indexes in same.items():
        patterns.setdefault(_pattern(manifest.tensors[indexes[0]], cut, row), []).extend(indexes)
    return Needs(manifest=manifest, receivers=len(layouts), groups=groups, patterns=patterns, boxes=numbers.boxes)


_Parts = int | tuple[int, ...]  # _WHOLE or the index of a box; several where a layout names a tensor several times


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """What one receiver needs, by index of the tensor."""

    parts: Mapping[int, _Parts]
    groups: Mapping[int, str]
    uncut: frozenset[int]

    @classmethod
    def of(cls, layout: Layout, numbers: _PartNumbers) -> _Column:
        entries: Sequence[LayoutEntry] = layout.entries
        indexes = numbers.indexes(entries)
        parts: list[int] = numbers.parts(entries, indexes)
        if _NOTHING in parts:
            kept = [place for place, part in enumerate(parts) if part != _NOTHING]
            entries = [entries[place] for place in kept]
            indexes, parts = [indexes[place] for place in kept], [parts[place] for place in kept]
        by_index: dict[int, _Parts] = dict(zip(indexes, parts, strict=True))
        groups = dict(zip(indexes, (entry.group for entry in entries), strict=True))
        if len(by_index) < len(indexes):
            by_index, groups = _merged(indexes, parts, entries)
        uncut = frozenset(index for index, entry in zip(indexes, entries, strict=True) if not entry.cut)
        return cls(parts=by_index, groups=groups, uncut=uncut)


def _merged(
    indexes: Sequence[int], parts: Sequence[int], entries: Sequence[LayoutEntry]
) -> tuple[dict[int, _Parts], dict[int, str]]:
    """All parts, and the first group, of tensors of which some are named several times."""
    merged: dict[int, list[int]] = {}
    groups: dict[int, str] = {}
    for index, part, entry in zip(indexes, parts, entries, strict=True):
        merged.setdefault(index, []).append(part)
        groups[index] = groups.get(index) or entry.group
    return {index: tuple(found) for index, found in merged.items()}, groups


def _pattern(tensor: TensorMeta, cut: bool, row: tuple[_Parts | None, ...]) -> Pattern:
    whole, slices = 0, []
    for receiver, parts in enumerate(row):
        for part in (parts,) if isinstance(parts, int) else parts or ():
            if part == _WHOLE:
                whole |= 1 << receiver
            else:
                slices.append((receiver, part))
    return Pattern(shape=tensor.shape, dtype=tensor.dtype, cut=cut, whole=whole, slices=tuple(slices))


class _PartNumbers(dict[tuple[int, Box | None], int]):
    """_WHOLE, _NOTHING, or the index of the box, by the tensor's kind and the slice: numbered as they are first asked for."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__()
        self.boxes: list[Box] = []
        self._manifest = manifest
        self._shapes = dict(zip(manifest.kinds, (tensor.shape for tensor in manifest.tensors), strict=True))

    def __missing__(self, key: tuple[int, Box | None]) -> int:
        kind, box = key
        number = self[key] = self._number(self._shapes[kind], box)
        return number

    def _number(self, shape: tuple[int, ...], box: Box | None) -> int:
        if box is None:
            return _WHOLE
        if not box.fits(shape):
            return _OUTSIDE
        if box.shape == shape:
            return _WHOLE
        # An empty slice of a tensor with elements is no need at all; an empty tensor still has to arrive.
        if not box.size and 0 not in shape:
            return _NOTHING
        self.boxes.append(box)
        return len(self.boxes) - 1

    def indexes(self, entries: Sequence[LayoutEntry]) -> list[int]:
        """Of the tensors, in the manifest."""
        try:
            return list(map(self._manifest.positions.__getitem__, [entry.tensor for entry in entries]))
        except KeyError:
            return [self._manifest.index_of(entry.tensor) for entry in entries]  # raises

    def parts(self, entries: Sequence[LayoutEntry], indexes: Sequence[int]) -> list[int]:
        """Of the slices."""
        kinds = map(self._manifest.kinds.__getitem__, indexes)
        parts = list(map(self.__getitem__, zip(kinds, [entry.box for entry in entries], strict=True)))
        if _OUTSIDE in parts:
            place = parts.index(_OUTSIDE)
            box_of(entries[place], self._manifest.tensors[indexes[place]].shape)  # raises
        return parts


def _union_size(boxes: list[Box]) -> int:
    size = 0
    for position, box in enumerate(boxes):
        parts = [box]
        for other in boxes[:position]:
            parts = [rest for part in parts for rest in part.subtract(other)]
        size += sum(part.size for part in parts)
    return size


def bits(mask: int) -> Iterator[int]:
    """Positions of the bits that are set, in ascending order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def make_buckets(
    manifest: Manifest, layouts: Sequence[Layout], *, bucket_bytes: int, align_bytes: int = ALIGN_BYTES
) -> tuple[Bucket, ...]:
    """Buckets of everything that at least one layout needs, each byte once.

    Groups come in natural order of their names, each in one go; inside a group as in the layouts.
    A tensor that is larger than a bucket and may not be cut gets a bucket of its own.

    Args:
        manifest: the checkpoint.
        layouts: what each receiver needs.
        bucket_bytes: size of a bucket.
        align_bytes: pieces begin at multiples of this.

    Raises:
        CapacityError: a bucket that holds not even one aligned piece.
        ManifestError, CoverageError: a layout does not fit the checkpoint.
    """
    needs = collect_needs(manifest, layouts)
    return tuple(bucket for bucket, _ in pack(needs, bucket_bytes=bucket_bytes, align_bytes=align_bytes))


def pack(needs: Needs, *, bucket_bytes: int, align_bytes: int = ALIGN_BYTES) -> list[tuple[Bucket, int]]:
    """`make_buckets`, each with the bit set of its receivers."""
    if align_bytes < 1 or bucket_bytes < align_bytes:
        raise CapacityError(
            f"bucket size: expected at least one aligned piece of {align_bytes} bytes, got {bucket_bytes}; "
            "give some tens of MiB"
        )
    piece_bytes = max(bucket_bytes // _PIECES_PER_BUCKET, align_bytes)
    parts: dict[int, list[Part]] = {}
    for pattern, indexes in needs.patterns.items():
        parts.update(dict.fromkeys(indexes, _parts(pattern, needs.boxes, piece_bytes)))
    packer = _Packer(capacity_bytes=bucket_bytes // align_bytes * align_bytes, align_bytes=align_bytes)
    for index in _in_group_order(needs):
        for part in parts[index]:
            packer.add(index, part)
    return packer.finish()


class _Packer:
    """Fills buckets in sequence: what does not fit any more opens the next one."""

    def __init__(self, *, capacity_bytes: int, align_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._align_bytes = align_bytes
        self._buckets: list[tuple[Bucket, int]] = []
        self._pieces: list[Piece] = []
        self._receivers = 0
        self._end_bytes = 0

    def add(self, tensor: int, part: Part) -> None:
        if self._pieces and self._end_bytes + part.size_bytes > self._capacity_bytes:
            self._close()
        offset = self._end_bytes
        piece = Piece(tensor=tensor, box=part.box, offset_bytes=offset, size_bytes=part.size_bytes)
        self._pieces.append(piece)
        self._receivers |= part.receivers
        self._end_bytes = -(-(offset + part.size_bytes) // self._align_bytes) * self._align_bytes

    def finish(self) -> list[tuple[Bucket, int]]:
        if self._pieces:
            self._close()
        return self._buckets

    def _close(self) -> None:
        bucket = Bucket(index=len(self._buckets), size_bytes=self._end_bytes, pieces=tuple(self._pieces))
        self._buckets.append((bucket, self._receivers))
        self._pieces = []
        self._receivers = 0
        self._end_bytes = 0


def _in_group_order(needs: Needs) -> Iterator[int]:
    """Tensor indexes, group by group. A tensor without a group is one of its own, in its place by name."""
    members: dict[str, list[int]] = {}
    alone: dict[str, int] = {}
    for index, group in needs.groups.items():
        if group:
            members.setdefault(group, []).append(index)
        else:
            alone[needs.manifest.tensors[index].name] = index
    labels = [(name, False) for name in alone] + [(group, True) for group in members]
    # Names such as layers.2 and layers.02 are equal by number; the label itself keeps the order total.
    for text, is_group in sorted(labels, key=lambda label: (natural_key(label[0]), label)):
        yield from members[text] if is_group else (alone[text],)


def natural_key(name: str) -> NaturalKey:
    """Sort key that puts layers.2 before layers.10 and keeps a parent's children together.

    Numbers are compared by length and digits: no name is too long for an integer.
    """
    return tuple(map(_component_key, name.split(".")))


@lru_cache(maxsize=4096)
def _component_key(component: str) -> _ComponentKey:
    return tuple(
        (len(number := text.lstrip("0")), number) if position % 2 else text
        for position, text in enumerate(_DIGITS.split(component))
    )


def _parts(pattern: Pattern, boxes: Sequence[Box], piece_bytes: int) -> list[Part]:
    """What to send of a tensor, in row-major order."""
    shape, dtype, cut, whole, slices = pattern.shape, pattern.dtype, pattern.cut, pattern.whole, pattern.slices
    needed = [(receiver, boxes[number]) for receiver, number in slices]
    everybody = reduce(or_, (1 << receiver for receiver, _ in needed), whole)
    total_bytes = size_bytes(shape, dtype)
    if not cut or not shape or not total_bytes:
        return [Part(box=None, size_bytes=total_bytes, receivers=everybody)]
    runs = [(0, shape[0])] if whole else _merge((box.start[0], box.stop[0]) for _, box in needed)
    cuts = []
    for first, stop in runs:
        rows = Box(start=(first, *[0] * (len(shape) - 1)), shape=(stop - first, *shape[1:]))
        cuts.extend(rows.split_rows(piece_bytes, dtype.itemsize))
    parts = []
    for box in cuts:
        receivers = reduce(or_, (1 << to for to, need in needed if not need.disjoint(box)), whole)
        # A row that is cut itself has parts which nobody needs.
        if receivers:
            is_all = box.shape == shape
            size = box.size * dtype.itemsize
            parts.append(Part(box=None if is_all else box, size_bytes=size, receivers=receivers))
    return parts


def _merge(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Union of runs of rows [first, stop), in ascending order."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged
