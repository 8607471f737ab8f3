"""Packs what ranks need of a checkpoint into buckets: aligned contiguous bytes that travel as one.

A tensor goes whole, or, where every rank that needs it takes parts, in runs of rows that some rank needs.
Tensors of one group follow each other. Cut pieces are at most a quarter of a bucket, so that buckets fill
evenly: small or uneven ones cost a third of the speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from operator import or_

import msgspec

from ckpt_core.dtypes import DType, size_bytes
from ckpt_core.errors import CapacityError
from ckpt_core.layout import Box, Layout, LayoutEntry, box_of
from ckpt_core.manifest import Manifest

ALIGN_BYTES = 256
_PIECES_PER_BUCKET = 4
_DIGITS = re.compile(r"([0-9]+)")

_ComponentKey = tuple[str | tuple[int, str], ...]
NaturalKey = tuple[_ComponentKey, ...]


class Piece(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tensor, or a part of one that is contiguous in the checkpoint, in a bucket.

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


@dataclass(slots=True, kw_only=True)
class TensorNeed:
    """Who needs what of one tensor.

    Attributes:
        group: the first group that a layout names for it.
        cut: whether everybody takes it in parts.
        whole: bit r is set where receiver r needs all of it.
        slices: receiver, and index in `Needs.boxes`, for those who need a part.
    """

    group: str = ""
    cut: bool = True
    whole: int = 0
    slices: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is sent of a tensor in one piece (None: all), its bytes, and the bit set of those who need it."""

    box: Box | None
    size_bytes: int
    receivers: int


# No slots: cached_property needs a __dict__.
@dataclass(kw_only=True)
class Needs:
    """What receivers need of a checkpoint.

    Models repeat a few shapes and slices a hundred thousand times, so boxes are kept once, and what
    follows from a shape and its slices is worked out once.

    Attributes:
        manifest: the checkpoint.
        receivers: number of layouts.
        tensors: by index in the manifest, in the order in which layouts first name them.
        boxes: the different slices.
    """

    manifest: Manifest
    receivers: int
    tensors: dict[int, TensorNeed] = field(default_factory=dict)
    boxes: list[Box] = field(default_factory=list)

    @cached_property
    def by_pattern(self) -> dict[_Pattern, list[int]]:
        """Indexes of tensors that are alike in everything that decides how they are cut and who gets what.

        Asked for when the needs are complete.
        """
        patterns: dict[_Pattern, list[int]] = {}
        for index, need in self.tensors.items():
            tensor = self.manifest.tensors[index]
            key = (tensor.shape, tensor.dtype, need.cut, need.whole, tuple(need.slices))
            patterns.setdefault(key, []).append(index)
        return patterns

    def bytes_by_receiver(self) -> tuple[int, ...]:
        """Bytes that each receiver needs; a byte that two of its slices share counts once."""
        total = [0] * self.receivers
        for (shape, dtype, _, whole, slices), indexes in self.by_pattern.items():
            for receiver in bits(whole):
                total[receiver] += size_bytes(shape, dtype) * len(indexes)
            boxes: dict[int, list[Box]] = {}
            for receiver, number in slices:
                if not whole >> receiver & 1:
                    boxes.setdefault(receiver, []).append(self.boxes[number])
            for receiver, parts in boxes.items():
                total[receiver] += _union_size(parts) * dtype.itemsize * len(indexes)
        return tuple(total)


_Pattern = tuple[tuple[int, ...], DType, bool, int, tuple[tuple[int, int], ...]]
_WHOLE, _NOTHING = -1, -2


def collect_needs(manifest: Manifest, layouts: Sequence[Layout]) -> Needs:
    """Merge layouts, one per receiver.

    Raises:
        ManifestError: a layout names a tensor that the checkpoint does not have.
        CoverageError: a slice is not inside its tensor.
    """
    needs = Needs(manifest=manifest, receivers=len(layouts))
    known: dict[tuple[tuple[int, ...], Box], int] = {}
    positions, shapes, tensors = manifest.positions, [meta.shape for meta in manifest.tensors], needs.tensors
    for receiver, layout in enumerate(layouts):
        # Planning runs this a million times: no calls that a look-up can save.
        for entry in layout.entries:
            index = positions.get(entry.tensor, -1)
            if index < 0:
                index = manifest.index_of(entry.tensor)  # raises
            part = _WHOLE
            if (box := entry.box) is not None:
                key = (shapes[index], box)
                if (number := known.get(key)) is None:
                    number = known[key] = _part_number(needs.boxes, entry, shapes[index])
                part = number
            if part == _NOTHING:
                continue
            need = tensors.get(index)
            if need is None:
                need = tensors[index] = TensorNeed(group=entry.group, cut=entry.cut)
            else:
                need.group = need.group or entry.group
                need.cut = need.cut and entry.cut
            if part == _WHOLE:
                need.whole |= 1 << receiver
            else:
                need.slices.append((receiver, part))
    return needs


def _part_number(boxes: list[Box], entry: LayoutEntry, shape: tuple[int, ...]) -> int:
    """_WHOLE, _NOTHING, or the index of a new box."""
    box = box_of(entry, shape)
    if box.shape == shape:
        return _WHOLE
    # An empty slice of a tensor with elements is no need at all; an empty tensor still has to arrive.
    if not box.size and 0 not in shape:
        return _NOTHING
    boxes.append(box)
    return len(boxes) - 1


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
    for pattern, indexes in needs.by_pattern.items():
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
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, need in needs.tensors.items():
        label = (need.group, True) if need.group else (needs.manifest.tensors[index].name, False)
        groups.setdefault(label, []).append(index)
    # Names such as layers.2 and layers.02 are equal by number; the label itself keeps the order total.
    for label in sorted(groups, key=lambda label: (natural_key(label[0]), label)):
        yield from groups[label]


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


def _parts(pattern: _Pattern, boxes: list[Box], piece_bytes: int) -> list[Part]:
    """What to send of a tensor, in row-major order."""
    shape, dtype, cut, whole, slices = pattern
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
