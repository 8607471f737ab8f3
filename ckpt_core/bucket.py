"""Packs what ranks need of a checkpoint into buckets: aligned contiguous bytes that travel as one.

A tensor goes whole, or, where every rank that needs it takes parts, in runs of rows that some rank needs.
Tensors of one group follow each other. Cut pieces are at most a quarter of a bucket, so that buckets fill
evenly: small or uneven ones cost a third of the speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckpt_core.errors import CapacityError
from ckpt_core.layout import Box, Layout, LayoutEntry, box_of
from ckpt_core.manifest import Manifest, TensorMeta

ALIGN_BYTES = 256
_PIECES_PER_BUCKET = 4
_DIGITS = re.compile(r"([0-9]+)")

NaturalKey = tuple[tuple[str | tuple[int, str], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
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
        boxes: receiver and slice, for those who need a part.
    """

    group: str = ""
    cut: bool = True
    whole: int = 0
    boxes: list[tuple[int, Box]] = field(default_factory=list)

    def receivers(self, part: Box | None) -> int:
        """Bit set of the receivers that need an element of this part (None: of any)."""
        mask = self.whole
        for receiver, box in self.boxes:
            if not mask >> receiver & 1 and (part is None or not box.disjoint(part)):
                mask |= 1 << receiver
        return mask


Needs = dict[int, TensorNeed]


def collect_needs(manifest: Manifest, layouts: Sequence[Layout]) -> Needs:
    """Needs by tensor index, in the order in which layouts first name the tensors.

    Raises:
        ManifestError: a layout names a tensor that the checkpoint does not have.
        CoverageError: a slice is not inside its tensor.
    """
    needs: Needs = {}
    for receiver, layout in enumerate(layouts):
        for entry in layout.entries:
            index = manifest.index_of(entry.tensor)
            tensor = manifest.tensors[index]
            box = None if entry.box is None else box_of(entry, tensor.shape)
            # An empty slice of a tensor with bytes is no need at all; an empty tensor still has to arrive.
            if box is None or box.size or not tensor.size_bytes:
                _note(needs.setdefault(index, TensorNeed()), receiver, entry, tensor)
    return needs


def _note(need: TensorNeed, receiver: int, entry: LayoutEntry, tensor: TensorMeta) -> None:
    need.group = need.group or entry.group
    need.cut = need.cut and entry.cut
    if entry.box is None or entry.box.shape == tensor.shape:
        need.whole |= 1 << receiver
    else:
        need.boxes.append((receiver, entry.box))


def bytes_needed(manifest: Manifest, needs: Needs, receivers: int) -> tuple[int, ...]:
    """Bytes that each receiver needs; a byte that two of its slices share counts once."""
    total = [0] * receivers
    for index, need in needs.items():
        tensor = manifest.tensors[index]
        size_bytes = tensor.size_bytes
        for receiver in bits(need.whole):
            total[receiver] += size_bytes
        slices: dict[int, list[Box]] = {}
        for receiver, box in need.boxes:
            if not need.whole >> receiver & 1:
                slices.setdefault(receiver, []).append(box)
        for receiver, boxes in slices.items():
            total[receiver] += _union_size(boxes) * tensor.dtype.itemsize
    return tuple(total)


def _union_size(boxes: list[Box]) -> int:
    if len(boxes) == 1:
        return boxes[0].size
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
    return pack(manifest, needs, bucket_bytes=bucket_bytes, align_bytes=align_bytes)


def pack(
    manifest: Manifest, needs: Needs, *, bucket_bytes: int, align_bytes: int = ALIGN_BYTES
) -> tuple[Bucket, ...]:
    """`make_buckets` for needs that were collected before."""
    if align_bytes < 1 or bucket_bytes < align_bytes:
        raise CapacityError(
            f"bucket size: expected at least one aligned piece of {align_bytes} bytes, got {bucket_bytes}; "
            "give some tens of MiB"
        )
    packer = _Packer(capacity_bytes=bucket_bytes // align_bytes * align_bytes, align_bytes=align_bytes)
    piece_bytes = max(bucket_bytes // _PIECES_PER_BUCKET, align_bytes)
    for index in _in_group_order(manifest, needs):
        tensor = manifest.tensors[index]
        for box in _parts(tensor, needs[index], piece_bytes):
            size_bytes = tensor.size_bytes if box is None else box.size * tensor.dtype.itemsize
            packer.add(index, box, size_bytes)
    return packer.finish()


class _Packer:
    """Fills buckets in sequence: what does not fit any more opens the next one."""

    def __init__(self, *, capacity_bytes: int, align_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._align_bytes = align_bytes
        self._buckets: list[Bucket] = []
        self._pieces: list[Piece] = []
        self._end_bytes = 0

    def add(self, tensor: int, box: Box | None, size_bytes: int) -> None:
        if self._pieces and self._end_bytes + size_bytes > self._capacity_bytes:
            self._close()
        offset = self._end_bytes
        self._pieces.append(Piece(tensor=tensor, box=box, offset_bytes=offset, size_bytes=size_bytes))
        self._end_bytes = -(-(offset + size_bytes) // self._align_bytes) * self._align_bytes

    def finish(self) -> tuple[Bucket, ...]:
        if self._pieces:
            self._close()
        return tuple(self._buckets)

    def _close(self) -> None:
        bucket = Bucket(index=len(self._buckets), size_bytes=self._end_bytes, pieces=tuple(self._pieces))
        self._buckets.append(bucket)
        self._pieces = []
        self._end_bytes = 0


def _in_group_order(manifest: Manifest, needs: Needs) -> Iterable[int]:
    """Tensor indexes, group by group. A tensor without a group is one of its own, in its place by name."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, need in needs.items():
        label = (need.group, True) if need.group else (manifest.tensors[index].name, False)
        groups.setdefault(label, []).append(index)
    # Names such as layers.2 and layers.02 compare equal by number; the label itself keeps the order total.
    for label in sorted(groups, key=lambda label: (natural_key(label[0]), label)):
        yield from groups[label]


def natural_key(name: str) -> NaturalKey:
    """Sort key that puts layers.2 before layers.10 and keeps a parent's children together.

    Numbers are compared by length and digits: no name is too long for an integer.
    """
    return tuple(
        tuple(
            (len(number := text.lstrip("0")), number) if position % 2 else text
            for position, text in enumerate(_DIGITS.split(component))
        )
        for component in name.split(".")
    )


def _parts(tensor: TensorMeta, need: TensorNeed, piece_bytes: int) -> list[Box | None]:
    """Boxes to send of a tensor: None for the whole."""
    if not need.cut or not tensor.shape or not tensor.size_bytes:
        return [None]
    whole = Box.whole(tensor.shape)
    parts: list[Box | None] = []
    for first, stop in _needed_rows(tensor, need):
        rows = Box(start=(first, *whole.start[1:]), shape=(stop - first, *whole.shape[1:]))
        parts.extend(rows.split_rows(piece_bytes, tensor.dtype.itemsize))
    return [None] if parts == [whole] else parts


def _needed_rows(tensor: TensorMeta, need: TensorNeed) -> list[tuple[int, int]]:
    """Runs of rows [first, stop) that somebody needs an element of, in ascending order."""
    if need.whole:
        return [(0, tensor.shape[0])]
    merged: list[tuple[int, int]] = []
    for first, stop in sorted((box.start[0], box.start[0] + box.shape[0]) for _, box in need.boxes):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged
