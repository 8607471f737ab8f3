"""A routed plan as one host or one rank follows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt_core.errors import PlanError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest
from ckpt_core.routing.columns import Ints, ints, ranges
from ckpt_core.routing.lanes import NONE
from ckpt_core.routing.routed import RoutedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """What one host does, in the order of its lanes. NONE where it does not apply.

    Attributes:
        buckets: that it receives, or takes from its own pool, as they come.
        sender: host that each comes from; NONE for its own pool.
        nic, gpu: lane that it comes in by, and GPU whose ring it goes to.
        next_host: host that it is forwarded to, over the same NIC.
        turn: slot of each plus the hosts that it has passed: what they are sorted by.
        sends: buckets that it fills from its pool and sends.
        sends_to, sends_nic: first host of the chain of each, and the NIC.
    """

    host: int
    buckets: Ints
    sender: Ints
    nic: Ints
    gpu: Ints
    next_host: Ints
    turn: Ints
    sends: Ints
    sends_to: Ints
    sends_nic: Ints


def of_host(plan: RoutedPlan, host: int) -> HostView:
    """Read out one host.

    Raises:
        PlanError: there is no such host.
    """
    _check("host", host, plan.topology.hosts)
    kind = int(plan.hosts.of_host[host])
    buckets = _received(plan, kind)
    found = ints([_neighbours(plan, bucket, host) for bucket in buckets.tolist()]).reshape(-1, 3)
    comes = np.lexsort((buckets, plan.lanes.slot[buckets] + found[:, 2]))
    buckets, sender, following = buckets[comes], found[comes, 0], found[comes, 1]
    sends = np.flatnonzero(plan.lanes.owner == host)
    sends = sends[np.lexsort((sends, plan.lanes.slot[sends]))]
    return HostView(
        host=host,
        buckets=buckets,
        sender=sender,
        nic=np.where(sender != NONE, plan.lanes.nic[buckets, kind], NONE),
        gpu=plan.lanes.gpu[buckets, kind],
        next_host=following,
        turn=plan.lanes.slot[buckets] + found[comes, 2],
        sends=sends,
        sends_to=ints([int(plan.chain(bucket)[0]) for bucket in sends.tolist()]),
        sends_nic=plan.lanes.owner_nic[sends],
    )


def _received(plan: RoutedPlan, kind: int) -> Ints:
    if kind < 0:
        return np.zeros(0, dtype=np.int64)
    needs = np.array([mask >> kind & 1 for mask in plan.packed.pieces.receiver_sets], dtype=np.bool_)
    return np.flatnonzero(needs[plan.packed.receivers]) if len(needs) else np.zeros(0, dtype=np.int64)


def _neighbours(plan: RoutedPlan, bucket: int, host: int) -> tuple[int, int, int]:
    """Where a bucket comes from, where it goes next, and how many hops from its owner that is."""
    ring = plan.rings.remote(int(plan.packed.receivers[bucket]), int(plan.packed.holders[bucket]))
    at = int(np.searchsorted(ring, host))
    if at == len(ring) or ring[at] != host:
        return NONE, NONE, 0
    place = (at - int(plan.lanes.chain_start[bucket])) % len(ring)
    before = int(ring[at - 1]) if place else int(plan.lanes.owner[bucket])
    return before, int(ring[(at + 1) % len(ring)]) if place + 1 < len(ring) else NONE, place + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """What one rank takes out of its host's rings, in order; one place per part.

    Attributes:
        bucket, gpu: bucket, and GPU of its host in whose ring it is.
        piece: index among the plan's pieces: a box of a tensor, packed row-major at its offset in the bucket.
        box: index in `boxes`: the part of the tensor to take, inside the piece's box.
    """

    rank: int
    bucket: Ints
    gpu: Ints
    piece: Ints
    box: Ints
    boxes: tuple[Box, ...]


def of_rank(plan: RoutedPlan, manifest: Manifest, rank: int) -> RankView:
    """Read out one rank.

    Raises:
        PlanError: there is no such rank.
    """
    _check("rank", rank, plan.topology.ranks)
    kind = int(plan.hosts.of_host[plan.topology.rank_host[rank]])
    rank_class = int(plan.topology.rank_class[rank])
    buckets = _received(plan, kind)
    first, counts = plan.packed.first_piece[buckets], np.diff(plan.packed.first_piece)[buckets]
    pieces, of_bucket = ranges(first, counts), np.repeat(buckets, counts)
    tensor, box = plan.packed.pieces.tensor[pieces], plan.packed.pieces.box[pieces]
    pattern = plan.patterns.of_tensor[tensor]
    key = pattern * len(plan.packed.pieces.boxes) + box
    different, example, which = np.unique(key, return_index=True, return_inverse=True)
    boxes: dict[Box, int] = {}
    found = [
        [boxes.setdefault(part, len(boxes)) for part in _taken(plan, manifest, rank_class, int(tensor[e]), int(box[e]))]
        for e in example.tolist()
    ]
    which = which.reshape(-1)
    number = ints([len(parts) for parts in found])
    begins = np.concatenate([[0], np.cumsum(number)])[:-1].astype(np.int64)
    flat = ints([part for parts in found for part in parts])
    taken = ranges(begins[which], number[which]) if len(different) else np.zeros(0, dtype=np.int64)
    repeat = number[which] if len(different) else np.zeros(0, dtype=np.int64)
    bucket = np.repeat(of_bucket, repeat)
    return RankView(
        rank=rank,
        bucket=bucket,
        gpu=plan.lanes.gpu[bucket, kind],
        piece=np.repeat(pieces, repeat),
        box=flat[taken],
        boxes=tuple(boxes),
    )


def _taken(plan: RoutedPlan, manifest: Manifest, rank_class: int, tensor: int, box: int) -> list[Box]:
    """Disjoint parts of a piece that a class needs."""
    shape = manifest.tensors[tensor].shape
    piece = plan.packed.pieces.boxes[box]
    needed = plan.patterns.needed(rank_class, tensor, shape)
    if not piece.size:
        return [piece] if needed else []
    parts: list[Box] = []
    for need in needed:
        common = need.intersect(piece)
        fresh = [common] if common is not None else []
        for known in parts:
            fresh = [rest for part in fresh for rest in part.subtract(known)]
        parts += fresh
    return parts


def _check(what: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        raise PlanError(f"{what}: expected 0 to {count - 1}, got {number}; the plan is of another cluster")
