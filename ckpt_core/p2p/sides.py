"""The two sides of an assignment as problems of lanes: what leaves owners, and what comes in at each receiver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_core.errors import PlanError
from ckpt_core.p2p.fleet import ANYWHERE, Fleet, NicLane, Owner, Receiver
from ckpt_core.p2p.lane_flow import Lanes
from ckpt_core.p2p.reads import Reads
from ckpt_core.p2p.spreading import Ranges
from ckpt_core.routing.columns import Bools, Ints, ints


@dataclass(frozen=True, slots=True, kw_only=True)
class NicGroup:
    """NICs of one owner or receiver, all of which the same bytes may cross.

    Attributes:
        who: number of the owner or receiver.
        nics: numbers among its NICs.
        names: of these NICs, with that of who has them.
    """

    who: int
    nics: Ints
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Ranges and the lanes that they may cross.

    Attributes:
        rows: numbers of the reads that the ranges are.
        groups: by lane.
    """

    rows: Ints
    ranges: Ranges
    lanes: Lanes
    groups: tuple[NicGroup, ...]


def owner_side(fleet: Fleet, reads: Reads) -> Side:
    """What leaves owners: a lane is all NICs of an owner that the same bytes may cross, its parent is the owner.

    Ranges are in order of turn: receivers come forward together.

    Raises:
        PlanError: a piece that is wanted and that no owner can send.
    """
    groups = [group for number, owner in enumerate(fleet.owners) for group in _alike(number, owner.name, owner.nics)]
    may_leave = np.array([_may_leave(fleet, group) for group in groups], dtype=np.bool_).reshape(-1, fleet.pieces)
    _check_held(fleet, reads, may_leave)
    rows = np.lexsort((reads.receiver, reads.turn))
    allowed, kind = _different(may_leave)
    return Side(
        rows=rows,
        ranges=Ranges(size_bytes=reads.size_bytes[rows], group=kind[reads.piece[rows]], allowed=allowed),
        lanes=_owner_lanes(fleet.owners, groups),
        groups=tuple(groups),
    )


def receiver_sides(fleet: Fleet, reads: Reads) -> Iterator[Side]:
    """What comes in at each receiver; a lane is one NIC. `reads` are in order.

    Raises:
        PlanError: a piece is to come to a memory node that none of the NICs serves.
    """
    for number, receiver in enumerate(fleet.receivers):
        first, last = np.searchsorted(reads.receiver, [number, number + 1]).tolist()
        nodes, group = np.unique(reads.node[first:last], return_inverse=True)
        allowed = np.array([[nic.serves(node) for node in nodes.tolist()] for nic in receiver.nics], dtype=np.bool_)
        _check_served(receiver, nodes, allowed)
        if first < last:
            yield Side(
                rows=np.arange(first, last),
                ranges=Ranges(size_bytes=reads.size_bytes[first:last], group=group.reshape(-1), allowed=allowed),
                lanes=_nic_lanes(receiver.nics),
                groups=tuple(_group(number, receiver.name, receiver.nics, [nic]) for nic in range(len(receiver.nics))),
            )


def inner_sides(fleet: Fleet, groups: Sequence[NicGroup], reads: Reads, group: Ints) -> Iterator[Side]:
    """The NICs within each lane of the owners' side; a lane is one NIC. `group` is the lane that each read crosses."""
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(len(groups) + 1)).tolist()
    for found, first, last in zip(groups, ends[:-1], ends[1:], strict=True):
        rows, owner = order[first:last], fleet.owners[found.who]
        if first < last:
            yield Side(
                rows=rows,
                ranges=Ranges(
                    size_bytes=reads.size_bytes[rows],
                    group=np.zeros(len(rows), dtype=np.int64),
                    allowed=np.ones((len(found.nics), 1), dtype=np.bool_),
                ),
                lanes=_nic_lanes([owner.nics[nic] for nic in found.nics.tolist()]),
                groups=tuple(_group(found.who, owner.name, owner.nics, [nic]) for nic in found.nics.tolist()),
            )


def _alike(who: int, name: str, nics: Sequence[NicLane]) -> list[NicGroup]:
    """NICs that serve the same nodes together."""
    alike: dict[frozenset[int] | None, list[int]] = {}
    for number, nic in enumerate(nics):
        alike.setdefault(nic.nodes, []).append(number)
    return [_group(who, name, nics, numbers) for numbers in alike.values()]


def _group(who: int, name: str, nics: Sequence[NicLane], numbers: Sequence[int]) -> NicGroup:
    return NicGroup(who=who, nics=ints(numbers), names=tuple(f"{name}/{nics[number].name}" for number in numbers))


def _may_leave(fleet: Fleet, group: NicGroup) -> Bools:
    """Which pieces may leave their owner by these NICs."""
    owner = fleet.owners[group.who]
    nic = owner.nics[int(group.nics[0])]
    pieces = np.zeros(fleet.pieces, dtype=np.bool_)
    if owner.held_at is None:
        pieces[owner.holds] = nic.serves(ANYWHERE)
    else:
        nodes, number = np.unique(owner.held_at, return_inverse=True)
        serves = np.array([nic.serves(node) for node in nodes.tolist()], dtype=np.bool_)
        pieces[owner.holds] = serves[number.reshape(-1)] if len(nodes) else False
    return pieces


def _different(may_leave: Bools) -> tuple[Bools, Ints]:
    """Pieces that may leave by the same lanes are of one kind: lanes by kind, and kind of each piece."""
    packed = np.ascontiguousarray(np.packbits(may_leave, axis=0).T)
    whole = packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
    _, example, kind = np.unique(whole, return_index=True, return_inverse=True)
    return may_leave[:, example], kind.reshape(-1)


def _owner_lanes(owners: Sequence[Owner], groups: Sequence[NicGroup]) -> Lanes:
    rates = np.array([sum(owners[group.who].nics[nic].bytes_per_s for nic in group.nics.tolist()) for group in groups])
    parent = ints([group.who for group in groups])
    limits = np.array([np.inf if owner.max_bytes_per_s is None else owner.max_bytes_per_s for owner in owners])
    together = np.bincount(parent, weights=rates, minlength=len(owners))
    return Lanes(bytes_per_s=rates, parent=parent, parent_bytes_per_s=np.minimum(together, limits))


def _nic_lanes(nics: Sequence[NicLane]) -> Lanes:
    rates = np.array([nic.bytes_per_s for nic in nics])
    parent = np.zeros(len(nics), dtype=np.int64)
    return Lanes(bytes_per_s=rates, parent=parent, parent_bytes_per_s=rates.sum(keepdims=True))


def _check_held(fleet: Fleet, reads: Reads, may_leave: Bools) -> None:
    sendable: Bools = np.logical_or.reduce(may_leave, axis=0)
    lost = np.flatnonzero(~sendable[reads.piece])
    if not len(lost):
        return
    piece, receiver = int(reads.piece[lost[0]]), fleet.receivers[int(reads.receiver[lost[0]])]
    holders = [owner.name for owner in fleet.owners if piece in owner.holds]
    got = f"only owners whose NICs serve other memory nodes ({', '.join(holders)})" if holders else "none that holds it"
    raise PlanError(
        f"piece {piece}, wanted by {receiver.name}: expected an owner that can send it, got {got} among {len(fleet.owners)}; "
        f"{len(np.unique(reads.piece[lost]))} pieces have none: read them from the checkpoint instead"
    )


def _check_served(receiver: Receiver, nodes: Ints, allowed: Bools) -> None:
    for node, served in zip(nodes.tolist(), allowed.T, strict=True):
        if not served.any():
            raise PlanError(
                f"receiver {receiver.name}: expected a NIC for bytes to memory node {node}, got {len(receiver.nics)} that serve "
                "others; let one of them serve that node"
            )
