"""Plays a plan on lanes with rates, and says when the last byte is there. Discrete events; no clock, no threads, no torch.

Every lane serves buckets in the order of the plan, as agents, NICs and ranks do. Then the time of each event is the largest of
those it waits for plus what it takes itself, and events can be worked out in the order of the plan, without a queue of events
(a max-plus recurrence: Baccelli, Cohen, Olsder, Quadrat 1992, "Synchronization and Linearity"). It follows that a faster lane
never makes an update slower, and that it never takes less than its busiest lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ckpt_core.plan import Plan
from ckpt_core.routing.columns import Bools, Floats, Ints
from ckpt_core.routing.lanes import NONE
from ckpt_core.routing.routed import RoutedPlan

_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """Lanes of one host. GB/s are 1e9 bytes a second.

    Attributes:
        fill_gb_s: by agent, while all of them send: from the pool into its ring.
        pull_gb_s: from rings into the parameters of one rank.
        piece_s: beside its bytes, for each piece that an agent copies.
        bucket_s: beside its bytes, for each bucket that a rank takes.
        handover_s: until the other side sees that a bucket is there, or read.
    """

    fill_gb_s: tuple[float, ...]
    pull_gb_s: float
    piece_s: float = 3e-6
    bucket_s: float = 60e-6
    handover_s: float = 20e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulation gave.

    Attributes:
        seconds: until the last rank has its last byte.
        busy_s: of the busiest lane, by kind.
        ring_buckets: that a ring must hold for this order of lanes: with fewer, hosts would wait for each other.
    """

    seconds: float
    busy_s: Mapping[str, float]
    ring_buckets: int = 0

    @property
    def bottleneck(self) -> str:
        """Kind of the lane that is busiest."""
        return max(self.busy_s, key=lambda kind: self.busy_s[kind], default="")


def simulate_plan(plan: Plan, rates: HostRates) -> Simulated:
    """Play the plan of one host: agents fill their rings as ranks free them, ranks pull their share of each bucket.

    A rank takes of a bucket what it needs of all buckets on average; which bytes exactly its layout knows, not the plan.
    """
    arriving = [0] * plan.receivers
    for step in plan.steps:
        for receiver in step.receivers:
            arriving[receiver] += step.bucket.size_bytes
    share = [
        min(1.0, need / got) if got else 0.0 for need, got in zip(plan.bytes_needed_by_receiver, arriving, strict=True)
    ]
    free, done = [0.0] * plan.agents, [[0.0] for _ in range(plan.agents)]
    at = [0.0] * plan.receivers
    filled, pulled = [0.0] * plan.agents, [0.0] * plan.receivers
    for step in plan.steps:
        owner, size = step.owner, step.bucket.size_bytes
        takes = size / (rates.fill_gb_s[owner] * _GB) + rates.piece_s * len(step.bucket.pieces)
        free[owner] = max(free[owner], done[owner][step.free_after_seq]) + takes
        filled[owner] += takes
        there, last = free[owner] + rates.handover_s, 0.0
        for receiver in step.receivers:
            takes = share[receiver] * size / (rates.pull_gb_s * _GB) + rates.bucket_s
            at[receiver] = max(at[receiver], there) + takes
            pulled[receiver] += takes
            last = max(last, at[receiver])
        done[owner].append(max(done[owner][-1], last + rates.handover_s))
    return Simulated(
        seconds=max([*free, *at], default=0.0),
        busy_s={"agent to ring": max(filled, default=0.0), "ring to rank": max(pulled, default=0.0)},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRates:
    """What the topology of a routed plan does not say.

    Attributes:
        pull_gb_s: from the rings of a host into its ranks, all ranks at once.
        ring_buckets: buckets that a GPU's ring holds; the next waits until the one it overwrites is forwarded and read.
        chunk_bytes: a host begins to forward a bucket when so much of it has come in.
        hop_s: latency from host to host.
    """

    pull_gb_s: float = 300.0
    ring_buckets: int = 8
    chunk_bytes: int = 1 << 20
    hop_s: float = 20e-6


def simulate_routed(plan: RoutedPlan, rates: FleetRates | None = None) -> Simulated:
    """Play a routed plan: each bucket goes along its chain, and into a ring of each host.

    Lanes serve in the order of the plan: by slot plus hops. All hops of one slot are worked out at once.
    """
    fleet = _Fleet(plan, rates or FleetRates())
    slots = plan.lanes.slot
    by_slot = np.argsort(slots, kind="stable")
    moving = np.zeros(0, dtype=np.int64)
    begun, now = 0, 0
    while begun < len(by_slot) or len(moving):
        if not len(moving):
            now = int(slots[by_slot[begun]])
        end = int(np.searchsorted(slots[by_slot], now, side="right"))
        fresh = by_slot[begun:end]
        begun = end
        for bucket in fresh.tolist():
            fleet.take_from_pools(bucket)
        moving = np.concatenate([moving, fresh[plan.lanes.owner[fresh] != NONE]])
        fleet.move(moving, now - slots[moving])
        now += 1
        moving = moving[now - slots[moving] < fleet.hops[moving]]
    busy = {kind.value: seconds for kind, seconds in plan.busiest_s().items()}
    return Simulated(seconds=fleet.end_s, busy_s=busy, ring_buckets=fleet.deepest + 1)


class _Fleet:
    """When each lane and each place in a ring is free again, and how far each bucket has come."""

    def __init__(self, plan: RoutedPlan, rates: FleetRates) -> None:
        topology = plan.topology
        self._plan, self._rates = plan, rates
        self._nics, self._gpus = plan.lanes.nic_in_bytes.shape[1], plan.lanes.pcie_bytes.shape[1]
        self._in_s = np.zeros(topology.hosts * self._nics)
        self._out_s = np.zeros(topology.hosts * self._nics)
        self._pcie_s = np.zeros(topology.hosts * self._gpus)
        self._room_s = np.zeros((topology.hosts * self._gpus, rates.ring_buckets))
        self._taken = np.zeros(topology.hosts * self._gpus, dtype=np.int64)
        self._nic_per_byte_s: Floats = 1 / (topology.nic_gb_s * _GB)
        self._pcie_per_byte_s: Floats = 1 / (topology.pcie_gb_s * _GB)
        self._sizes: Floats = plan.packed.size_bytes.astype(np.float64)
        self._first_s = np.zeros(plan.buckets)  # the first chunk of each bucket, at the host it has come to
        self._there_s = np.full(plan.buckets, -np.inf)  # all of it
        self._place = np.zeros(plan.buckets, dtype=np.int64)  # in the ring of that host
        self._unsent = np.zeros(topology.hosts * self._gpus, dtype=np.int64)  # in a ring, to be forwarded
        self._chains(plan)
        self.end_s = 0.0
        self.deepest = 0

    def _chains(self, plan: RoutedPlan) -> None:
        """All rings one behind the other, and for each bucket where its ring begins and how many hosts it has."""
        pairs = plan.packed.receivers * len(plan.topology.holder_sets) + plan.packed.holders
        different, which = np.unique(pairs, return_inverse=True)
        sets = len(plan.topology.holder_sets)
        rings = [plan.rings.remote(pair // sets, pair % sets) for pair in different.tolist()]
        lengths = np.array([len(ring) for ring in rings], dtype=np.int64)
        begins = np.cumsum(lengths) - lengths
        self._ring_hosts: Ints = np.concatenate([*rings, np.zeros(0, dtype=np.int64)])
        which = which.reshape(-1)
        self._ring_begin: Ints = begins[which] if rings else np.zeros(0, dtype=np.int64)
        self.hops: Ints = lengths[which] if rings else np.zeros(0, dtype=np.int64)

    def take_from_pools(self, bucket: int) -> None:
        """Hosts that have it copy it into their own ring."""
        hosts = self._plan.local(bucket)
        if not len(hosts):
            return
        gpu = hosts * self._gpus + self._plan.lanes.gpu[bucket][self._plan.hosts.of_host[hosts]]
        place = self._taken[gpu] % self._rates.ring_buckets
        takes = self._sizes[bucket] * self._pcie_per_byte_s[hosts]
        finish = np.maximum(self._pcie_s[gpu], self._room_s[gpu, place]) + takes
        self._pcie_s[gpu] = finish
        self._read(gpu, place, finish + self._sizes[bucket] / (self._rates.pull_gb_s * _GB))

    def move(self, buckets: Ints, hop: Ints) -> None:
        """Each bucket makes one hop; of those that want the same lane, the lowest bucket first."""
        while len(buckets):
            host = self._host(buckets, hop)
            lane = self._plan.lanes.nic[buckets, self._plan.hosts.of_host[host]]
            into = host * self._nics + lane
            first = hop == 0
            sender = np.where(first, self._plan.lanes.owner[buckets], self._host(buckets, np.maximum(hop - 1, 0)))
            sent_by = self._plan.lanes.nic[buckets, np.maximum(self._plan.hosts.of_host[sender], 0)]
            out = sender * self._nics + np.where(first, self._plan.lanes.owner_nic[buckets], sent_by)
            gpu = host * self._gpus + self._plan.lanes.gpu[buckets, self._plan.hosts.of_host[host]]
            chosen = _foremost(into, len(self._in_s)) & _foremost(out, len(self._out_s))
            chosen &= _foremost(gpu, len(self._pcie_s))
            self._hop(
                buckets[chosen], hop[chosen], host[chosen], sender[chosen], (into[chosen], out[chosen], gpu[chosen])
            )
            buckets, hop = buckets[~chosen], hop[~chosen]

    def _host(self, buckets: Ints, hop: Ints) -> Ints:
        place = (self._plan.lanes.chain_start[buckets] + hop) % self.hops[buckets]
        return self._ring_hosts[self._ring_begin[buckets] + place]

    def _hop(self, buckets: Ints, hop: Ints, host: Ints, sender: Ints, lanes: tuple[Ints, Ints, Ints]) -> None:
        """From sender to host: lanes free, room in the ring, and the first chunk there to forward."""
        into, out, gpu = lanes
        rates, size = self._rates, self._sizes[buckets]
        per_byte = np.maximum(
            np.maximum(self._nic_per_byte_s[host], self._nic_per_byte_s[sender]), self._pcie_per_byte_s[host]
        )
        place = self._taken[gpu] % rates.ring_buckets
        free = np.maximum(np.maximum(self._in_s[into], self._out_s[out]), self._pcie_s[gpu])
        free = np.maximum(free, self._room_s[gpu, place])
        chunk_s = np.minimum(size, rates.chunk_bytes) * per_byte + rates.hop_s
        start = np.maximum(free, self._first_s[buckets])
        finish = np.maximum(start + size * per_byte, self._there_s[buckets] + chunk_s)
        self._in_s[into], self._out_s[out], self._pcie_s[gpu] = finish, finish, finish
        forwarded = hop > 0
        before = sender[forwarded] * self._gpus + self._sender_gpu(buckets[forwarded], sender[forwarded])
        was = self._place[buckets[forwarded]]
        np.subtract.at(self._unsent, before, 1)
        self._unsent[gpu] += hop + 1 < self.hops[buckets]
        self.deepest = max(self.deepest, int(self._unsent[gpu].max()))
        self._room_s[before, was] = np.maximum(self._room_s[before, was], finish[forwarded])
        self._first_s[buckets], self._there_s[buckets], self._place[buckets] = start + chunk_s, finish, place
        self._read(gpu, place, finish + size / (rates.pull_gb_s * _GB))

    def _sender_gpu(self, buckets: Ints, sender: Ints) -> Ints:
        return self._plan.lanes.gpu[buckets, self._plan.hosts.of_host[sender]]

    def _read(self, gpu: Ints, place: Ints, read_s: Floats) -> None:
        self._room_s[gpu, place] = read_s
        self._taken[gpu] += 1
        self.end_s = max(self.end_s, float(read_s.max(initial=0.0)))


def _foremost(lanes: Ints, number: int) -> Bools:
    """Which of these come first of all that want the same lane."""
    first = np.zeros(number, dtype=np.int64)
    places = np.arange(len(lanes))
    first[lanes[::-1]] = places[::-1]
    found: Bools = first[lanes] == places
    return found
