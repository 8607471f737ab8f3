"""What one rank takes out of a plan: worked out once, and good for every update by the same plan.

A rank that shares a bucket with others takes only the pieces that touch its own layout. With thousands of small tensors the
time per piece decides: buckets and tensors are made once, and a view of the ring only where the plugin asks for it. In a
first update a bucket is made while the rank waits for its bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ckpt_core.bucket import Piece
from ckpt_core.contract import LoadBucket, LoadTensor
from ckpt_core.dtypes import DType
from ckpt_core.manifest import TensorMeta
from ckpt_core.parts import Taken, parts_of
from ckpt_core.plan import Plan, Step
from ckpt_core.strided import Strided, row_major
from ckpt_core.transport.base import RingReader
from ckpt_core.wanted import Wanted

if TYPE_CHECKING:
    import torch


class RingPlace:
    """Where the ring of one owner is mapped in the present update."""

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None
        self._typed: dict[DType, torch.Tensor] = {}

    def move(self, ring: torch.Tensor | None) -> None:
        """From now on it is here (uint8, the whole ring), or nowhere."""
        self._bytes = ring
        self._typed.clear()

    def bytes(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Raw bytes of it."""
        assert self._bytes is not None, "no ring is mapped"
        return self._bytes[offset_bytes : offset_bytes + size_bytes]

    def typed(self, dtype: DType) -> torch.Tensor:
        """All of it as elements of a type; pieces begin at multiples of 256 bytes, so at an element."""
        if dtype not in self._typed:
            assert self._bytes is not None, "no ring is mapped"
            whole = self._bytes.numel() // dtype.itemsize * dtype.itemsize
            self._typed[dtype] = self._bytes[:whole].view(torch_dtype(dtype))
        return self._typed[dtype]


class RingTensor(LoadTensor):
    """A piece of a plan, as hooks see it."""

    __slots__ = ("_dtype", "_offset", "_place", "_shape", "_strides")

    def __init__(self, meta: TensorMeta, piece: Piece, place: RingPlace, offset_bytes: int) -> None:
        super().__init__(name=meta.name, box=piece.box)
        self._place = place
        self._dtype = meta.dtype
        self._offset = offset_bytes // meta.dtype.itemsize
        self._shape = meta.shape if piece.box is None else piece.box.shape
        self._strides = row_major(self._shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the piece."""
        return self._shape

    @property
    def tensor(self) -> torch.Tensor:
        """A view of the ring, made now."""
        return self._place.typed(self._dtype).as_strided(self._shape, self._strides, self._offset)

    def strided(self, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
        """See LoadTensor."""
        return self._place.typed(self._dtype).as_strided(size, stride, self._offset + offset)


class TakenPart(NamedTuple):
    """What the rank takes of one piece.

    Attributes:
        number: among all that it takes of this bucket.
        item: the piece, as hooks see it.
        region: elements of the piece, counted from its first.
        whole: that is all of them.
        offset_bytes: of the piece, in the ring.
        size_bytes: of the part.
    """

    number: int
    item: LoadTensor
    region: Strided
    whole: bool
    offset_bytes: int
    size_bytes: int


# No slots: what follows from it is kept beside it.
@dataclass(frozen=True, kw_only=True)
class IncomingBucket:
    """What a rank takes of one bucket.

    Attributes:
        load: for the plugin.
        names: of its tensors.
        size_bytes: of its pieces.
        parts: what the rank takes of these pieces.
    """

    load: LoadBucket
    names: frozenset[str]
    size_bytes: int
    parts: tuple[TakenPart, ...]
    place: RingPlace

    def split(self, replayed: frozenset[str]) -> SplitBucket:
        """What is replayed of it and what is not, by those names. Worked out once."""
        known = self.__dict__.get("_split")
        if known is None or known[0] is not replayed:
            known = self.__dict__["_split"] = (replayed, _split(self, replayed))
        found: SplitBucket = known[1]
        return found


class SplitBucket(NamedTuple):
    """Tensors to replay, what is taken of them, their names; and a bucket of the others."""

    replayed: tuple[LoadTensor, ...]
    parts: tuple[TakenPart, ...]
    names: frozenset[str]
    rest: LoadBucket


def _split(bucket: IncomingBucket, replayed: frozenset[str]) -> SplitBucket:
    items = tuple(item for item in bucket.load.tensors if item.name in replayed)
    rest = tuple(item for item in bucket.load.tensors if item.name not in replayed)
    return SplitBucket(
        replayed=items,
        parts=tuple(part for part in bucket.parts if part.item.name in replayed),
        names=frozenset(item.name for item in items),
        rest=LoadBucket(index=bucket.load.index, tensors=rest),
    )


class Incoming:
    """All that one rank takes.

    Attributes:
        names: of its tensors.
    """

    def __init__(self, plan: Plan, wanted: Wanted) -> None:
        self._places = [RingPlace() for _ in range(plan.agents)]
        self._wanted = wanted
        self.names = wanted.names
        self._buckets: dict[int, IncomingBucket] = {}

    def map(self, readers: Sequence[RingReader], ring_bytes: int) -> None:
        """The rings of this update are these."""
        for place, reader in zip(self._places, readers, strict=True):
            place.move(reader.view(0, ring_bytes))

    def unmap(self) -> None:
        """The rings are about to go."""
        for place in self._places:
            place.move(None)

    def of(self, step: Step) -> IncomingBucket:
        """What the rank takes of a step's bucket."""
        if (bucket := self._buckets.get(step.index)) is None:
            bucket = self._buckets[step.index] = _bucket(step, self._wanted, self._places[step.owner])
        return bucket


def _bucket(step: Step, wanted: Wanted, place: RingPlace) -> IncomingBucket:
    pieces = step.bucket.pieces
    taken = list(parts_of(step.bucket, wanted.boxes))
    items: dict[int, RingTensor] = {}
    for number in dict.fromkeys(part.piece for part in taken):
        meta = wanted.manifest.tensors[pieces[number].tensor]
        items[number] = RingTensor(meta, pieces[number], place, step.ring_offset_bytes + pieces[number].offset_bytes)
    return IncomingBucket(
        load=LoadBucket(index=step.index, tensors=tuple(items.values())),
        names=frozenset(item.name for item in items.values()),
        size_bytes=sum(pieces[number].size_bytes for number in items),
        parts=tuple(
            _part(number, part, pieces[part.piece], items[part.piece], step.ring_offset_bytes)
            for number, part in enumerate(taken)
        ),
        place=place,
    )


def _part(number: int, part: Taken, piece: Piece, item: RingTensor, ring_offset_bytes: int) -> TakenPart:
    region, size_bytes = Strided.whole(item.shape), piece.size_bytes
    if not part.whole:
        assert part.box is not None, "only boxes are parts"
        start = part.box.start if piece.box is None else part.box.relative_to(piece.box).start
        offset = sum(map(int.__mul__, start, region.stride))
        region = Strided(offset=offset, size=part.box.shape, stride=region.stride)
        size_bytes = piece.size_bytes // math.prod(item.shape) * part.box.size
    return TakenPart(number, item, region, part.whole, ring_offset_bytes + piece.offset_bytes, size_bytes)


@functools.cache
def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of that name."""
    import torch

    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found
