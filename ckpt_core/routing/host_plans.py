"""A routed plan as the hosts carry it out: to each host a plan of its own rings, and to each agent what it relays.

Ranks see the plan of one host, as if there were no other. Buckets come in the order of slot plus hops, which along a chain only
grows. Between coming in and going on a bucket needs a slot of its agent; slots are given in that order. Let there be as many
slots as there are buckets within two steps of that order: then all that has to be sent on before a bucket can come in was
sent one step before it at the latest, and no two hosts can wait for each other, whatever else is late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_core.assign import assign_owners
from ckpt_core.bucket import Bucket, Piece, collect_needs
from ckpt_core.layout import Box, Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, RingSpace, Step
from ckpt_core.relay import Arrival, Departure, Relay
from ckpt_core.routing.lanes import NONE
from ckpt_core.routing.routed import RoutedPlan
from ckpt_core.routing.views import HostView, of_host, of_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """What one host does.

    Attributes:
        plan: of its rings; receivers are its ranks, in order.
        relays: by agent of the host.
        network_bytes: that come in from other hosts.
    """

    plan: Plan
    relays: tuple[Relay, ...]
    network_bytes: int


def host_plans(
    routed: RoutedPlan, manifest: Manifest, layouts: Sequence[Layout], agents: Sequence[int], *, ring_bytes: int
) -> tuple[HostPlan, ...]:
    """Read out a routed plan for all hosts.

    Args:
        layouts: by rank.
        agents: number of agents, by host; those of hosts with ranks are the GPUs of the topology.
        ring_bytes: size of each ring; grows to the largest bucket.
    """
    places = _Places(routed, agents)
    plans, seqs = [], []
    for view in places.views:
        plan, its_seqs = _plan_of(
            places, manifest, view, [layouts[rank] for rank in places.ranks_of(view.host)], ring_bytes
        )
        plans.append(plan)
        seqs.append(its_seqs)
    return tuple(
        HostPlan(
            plan=plan,
            relays=tuple(_relay(places, manifest, view, agent, seqs) for agent in range(agents[view.host])),
            network_bytes=int(routed.packed.size_bytes[view.buckets[view.sender != NONE]].sum()),
        )
        for plan, view in zip(plans, places.views, strict=True)
    )


class _Places:
    """Which agent has a bucket, on each host that it passes: where it comes in, or who reads it from the pool."""

    def __init__(self, routed: RoutedPlan, agents: Sequence[int]) -> None:
        self.routed, self.agents = routed, agents
        self.views = views = [of_host(routed, host) for host in range(routed.topology.hosts)]
        self._gpu: list[dict[int, int]] = [
            dict(zip(view.buckets.tolist(), view.gpu.tolist(), strict=True)) for view in views
        ]
        self._first = [sum(agents[:host]) for host in range(len(agents))]
        self._reads: list[dict[int, int]] = []
        for view in views:
            owners = assign_owners(routed.packed.size_bytes[view.sends].tolist(), agents[view.host])
            self._reads.append(dict(zip(view.sends.tolist(), owners, strict=True)))

    def ranks_of(self, host: int) -> list[int]:
        """Ranks of a host, in order."""
        found: list[int] = np.flatnonzero(self.routed.topology.rank_host == host).tolist()
        return found

    def of(self, bucket: int, host: int) -> int:
        """Agent of that host where the bucket comes in."""
        return self._gpu[host][bucket]

    def sender(self, bucket: int, host: int, owner: int) -> int:
        """Agent of that host that sends it on."""
        return self._reads[host][bucket] if host == owner else self._gpu[host][bucket]

    def number(self, host: int, agent: int) -> int:
        """Number of an agent among those of all hosts."""
        return self._first[host] + agent


def _plan_of(
    places: _Places, manifest: Manifest, view: HostView, layouts: Sequence[Layout], ring_bytes: int
) -> tuple[Plan, dict[int, int]]:
    """Plan of a host, and the number that each bucket has in its agent's ring."""
    agents = places.agents[view.host]
    largest = int(places.routed.packed.size_bytes[view.buckets].max(initial=0))
    actual_ring_bytes = max(ring_bytes, largest)
    wanted = _receivers(places, manifest, view.host)
    rings = [RingSpace(actual_ring_bytes) for _ in range(agents)]
    steps, seqs = [], {}
    for index, (bucket, owner) in enumerate(zip(view.buckets.tolist(), view.gpu.tolist(), strict=True)):
        made = bucket_of(places.routed, manifest, bucket, index)
        offset, seq, free_after = rings[owner].append(made.size_bytes)
        seqs[bucket] = seq
        steps.append(
            Step(
                index=index,
                bucket=made,
                owner=owner,
                seq=seq,
                ring_offset_bytes=offset,
                free_after_seq=free_after,
                receivers=tuple(wanted.get(bucket, ())),
            )
        )
    plan = Plan(
        structure_digest=manifest.structure_digest,
        asked_ring_bytes=ring_bytes,
        ring_bytes=actual_ring_bytes,
        bucket_bytes=places.routed.bucket_bytes,
        agents=agents,
        receivers=len(layouts),
        bytes_needed_by_receiver=collect_needs(manifest, layouts).bytes_by_receiver() if layouts else (),
        steps=tuple(steps),
    )
    return plan, seqs


def _receivers(places: _Places, manifest: Manifest, host: int) -> dict[int, list[int]]:
    """By bucket: the host's ranks that take something of it, by their number there."""
    wanted: dict[int, list[int]] = {}
    for receiver, rank in enumerate(places.ranks_of(host)):
        for bucket in np.unique(of_rank(places.routed, manifest, rank).bucket).tolist():
            wanted.setdefault(bucket, []).append(receiver)
    return wanted


def bucket_of(routed: RoutedPlan, manifest: Manifest, bucket: int, index: int) -> Bucket:
    """A bucket of a routed plan, under another number."""
    packed = routed.packed
    begin, end = packed.first_piece[bucket : bucket + 2].tolist()
    columns = (packed.pieces.tensor, packed.pieces.box, packed.offset_bytes, packed.pieces.size_bytes)
    rows = zip(*(column[begin:end].tolist() for column in columns), strict=True)
    pieces = tuple(
        Piece(
            tensor=tensor,
            box=_unless_all(packed.pieces.boxes[box], manifest.tensors[tensor].shape),
            offset_bytes=offset,
            size_bytes=size,
        )
        for tensor, box, offset, size in rows
    )
    return Bucket(index=index, size_bytes=int(packed.size_bytes[bucket]), pieces=pieces)


def _unless_all(box: Box, shape: tuple[int, ...]) -> Box | None:
    return None if box.shape == shape else box


def _relay(places: _Places, manifest: Manifest, view: HostView, agent: int, seqs: Sequence[Mapping[int, int]]) -> Relay:
    """`seqs`: by host, the number that each bucket has in its agent's ring there."""
    routed = places.routed
    inlets: dict[int, int] = {}
    outlets: dict[int, int] = {}
    arrivals, turns = [], []
    departures: list[tuple[int, int, Departure]] = []
    columns = (view.buckets, view.sender, view.next_host, view.turn)
    mine = (view.gpu == agent) & (view.sender != NONE)
    for bucket, sender, following, turn in zip(*(column[mine].tolist() for column in columns), strict=True):
        before = places.number(sender, places.sender(bucket, sender, int(routed.lanes.owner[bucket])))
        arrivals.append(Arrival(seq=seqs[view.host][bucket], inlet=inlets.setdefault(before, len(inlets))))
        turns.append(turn)
        if following != NONE:
            outlet = outlets.setdefault(places.number(following, places.of(bucket, following)), len(outlets))
            there = seqs[following][bucket]
            departures.append((turn, bucket, Departure(outlet=outlet, to_seq=there, seq=seqs[view.host][bucket])))
    for bucket, to in zip(view.sends.tolist(), view.sends_to.tolist(), strict=True):
        if places.sender(bucket, view.host, view.host) == agent:
            outlet = outlets.setdefault(places.number(to, places.of(bucket, to)), len(outlets))
            content = bucket_of(routed, manifest, bucket, bucket)
            slot, there = int(routed.lanes.slot[bucket]), seqs[to][bucket]
            departures.append((slot, bucket, Departure(outlet=outlet, to_seq=there, bucket=content)))
    return Relay(
        inlets=tuple(inlets),
        outlets=tuple(outlets),
        arrivals=tuple(arrivals),
        departures=tuple(departure for _, _, departure in sorted(departures, key=lambda row: row[:2])),
        slots=_slots(turns),
    )


def _slots(turns: Sequence[int]) -> int:
    """Most buckets that come in, in order of their turns, of two turns that follow each other."""
    return max((place + 1 - bisect_left(turns, turn - 1) for place, turn in enumerate(turns)), default=0)
