"""Reads: who reads which bytes from whom, and over which NICs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ckpt_core.p2p.fleet import ANYWHERE, Fleet
from ckpt_core.routing.columns import Bools, Ints, ints, ranges

NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One of them; see Reads."""

    receiver: int
    piece: int
    turn: int
    node: int
    offset_bytes: int
    size_bytes: int
    owner: int
    owner_nic: int
    receiver_nic: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Columns, one place a read; by receiver, and for each in the order in which it wants pieces.

    Attributes:
        receiver, piece: numbers in the fleet.
        turn: place of the piece among those that the receiver wants.
        node: memory node that the bytes are to come to; ANYWHERE for any.
        offset_bytes, size_bytes: range inside the piece.
        owner: number of the owner in the fleet; NONE before it is assigned, like the NICs.
        owner_nic, receiver_nic: number among the NICs of each.
    """

    receiver: Ints
    piece: Ints
    turn: Ints
    node: Ints
    offset_bytes: Ints
    size_bytes: Ints
    owner: Ints
    owner_nic: Ints
    receiver_nic: Ints

    def __len__(self) -> int:
        return len(self.receiver)

    def __iter__(self) -> Iterator[Read]:
        names = [field.name for field in fields(self)]
        for row in zip(*(getattr(self, name).tolist() for name in names), strict=True):
            yield Read(**dict(zip(names, row, strict=True)))

    def where(self, inside: Bools | Ints) -> Reads:
        """Some of them, by a mask or by numbers."""
        return Reads(**{field.name: getattr(self, field.name)[inside] for field in fields(self)})

    def of_receiver(self, receiver: int) -> Reads:
        """What one receiver reads, in its order."""
        return self.where(self.receiver == receiver)

    def in_order(self) -> Reads:
        """By receiver, turn and offset."""
        return self.where(np.lexsort((self.offset_bytes, self.turn, self.receiver)))


def joined(several: Sequence[Reads]) -> Reads:
    """One behind the other; at least one."""
    return Reads(
        **{field.name: np.concatenate([getattr(one, field.name) for one in several]) for field in fields(Reads)}
    )


def wanted_reads(fleet: Fleet) -> Reads:
    """All that receivers want, whole, not assigned yet. Pieces without bytes are not read."""
    numbers = np.arange(len(fleet.receivers))
    counts = ints([len(one.wants) for one in fleet.receivers])
    piece = np.concatenate([ints([]), *(one.wants for one in fleet.receivers)])
    nodes = [np.full(len(one.wants), ANYWHERE) if one.wanted_at is None else one.wanted_at for one in fleet.receivers]
    none = np.full(len(piece), NONE)
    reads = Reads(
        receiver=np.repeat(numbers, counts),
        piece=piece,
        turn=ranges(np.zeros_like(counts), counts),
        node=np.concatenate([ints([]), *nodes]),
        offset_bytes=np.zeros_like(piece),
        size_bytes=fleet.sizes_bytes[piece],
        owner=none,
        owner_nic=none,
        receiver_nic=none,
    )
    return reads.where(reads.size_bytes > 0)


def unassigned(reads: Reads) -> Reads:
    """The same bytes without owners and NICs; ranges that touch are one again."""
    reads = reads.where(reads.size_bytes > 0).in_order()
    ends = reads.offset_bytes + reads.size_bytes
    touches = (np.diff(reads.receiver) == 0) & (np.diff(reads.turn) == 0) & (reads.offset_bytes[1:] == ends[:-1])
    first = np.flatnonzero(np.concatenate([ints([1])[: len(reads)], ~touches]))
    none = np.full(len(first), NONE)
    size = np.add.reduceat(reads.size_bytes, first) if len(first) else reads.size_bytes
    return replace(reads.where(first), size_bytes=size, owner=none, owner_nic=none, receiver_nic=none)
