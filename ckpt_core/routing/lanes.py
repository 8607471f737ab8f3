"""Deals buckets to lanes so that they carry even bytes, and chains the hosts that receive one.

A bucket goes to its receivers along a chain: its owner sends it once, each receiver but the last forwards it once, as it
comes in. So no NIC sends more than it receives, however many hosts there are, where a binomial tree would send log2(hosts)
times as much from its root. As each bucket begins somewhere else on the ring of its receivers, the whole is van de Geijn's
broadcast of long messages, a scatter followed by a ring all-gather (Chan, Heimlich, Purkayastha, van de Geijn 2007, "Collective
communication: theory, practice, and experience"), and where holders have different parts, the all-gather alone. Two
complementary trees (Sanders, Speck, Traeff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan") have
the same throughput at a depth of log2(hosts); the chain is simpler, and a chunk's way through it (hosts x chunk / rate) is short
against the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt_core.routing.columns import Bools, Floats, Ints, sums
from ckpt_core.routing.host_classes import HostClasses
from ckpt_core.routing.pieces import Packed
from ckpt_core.routing.topology import Topology

NONE = -1


def deal(sizes: Ints, groups: Ints, lanes: int) -> Ints:
    """Lane of each bucket: even bytes over the lanes in each group of buckets, and in all of them.

    Greedy in sequence (list scheduling, Graham 1966) among the lanes that are not ahead in the bucket's group. The group
    is the owner: a host does not receive what it has, and what is left of each lane must still be even.
    """
    if lanes <= 1:
        return np.zeros(len(sizes), dtype=np.int64)
    total = [0] * lanes
    own: dict[int, list[int]] = {}
    slack = int(sizes.max(initial=0)) // 2
    dealt = []
    for size, group in zip(sizes.tolist(), groups.tolist(), strict=True):
        loads = own.get(group)
        if loads is None:
            loads = own[group] = [0] * lanes
        limit = min(loads) + slack
        best, least = 0, -1
        for lane in range(lanes):
            if loads[lane] <= limit and (least < 0 or total[lane] < least):
                best, least = lane, total[lane]
        loads[best] += size
        total[best] += size
        dealt.append(best)
    return np.array(dealt, dtype=np.int64)


@dataclass(slots=True, kw_only=True)
class Rings:
    """The hosts that must receive a bucket from elsewhere, by its receivers and holders: a ring, in ascending order."""

    hosts: HostClasses
    receiver_sets: Sequence[int]
    holder_sets: Sequence[Sequence[int]]
    _remote: dict[tuple[int, int], Ints] = field(default_factory=dict)
    _local: dict[tuple[int, int], Ints] = field(default_factory=dict)

    def remote(self, receivers: int, holders: int) -> Ints:
        """Hosts that need it and do not have it."""
        self._find(receivers, holders)
        return self._remote[receivers, holders]

    def local(self, receivers: int, holders: int) -> Ints:
        """Hosts that need it and take it from their own pool."""
        self._find(receivers, holders)
        return self._local[receivers, holders]

    def _find(self, receivers: int, holders: int) -> None:
        if (receivers, holders) not in self._remote:
            everybody = self.hosts.hosts_of_set(self.receiver_sets[receivers])
            has: Bools = np.isin(everybody, np.array(self.holder_sets[holders], dtype=np.int64))
            self._remote[receivers, holders] = everybody[~has]
            self._local[receivers, holders] = everybody[has]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Who sends each bucket, over which lanes, and where its chain begins; NONE where it does not apply.

    Attributes:
        owner: host that sends it; NONE where every receiver has it.
        owner_nic: NIC that it leaves the owner by.
        chain_start: place in the ring of its receivers where the chain begins.
        nic: by bucket and kind of host: NIC that it comes in and is forwarded by.
        gpu: by bucket and kind of host: GPU whose ring it goes to.
        nic_in_bytes, nic_out_bytes: by host and NIC.
        pcie_bytes: by host and GPU.
    """

    owner: Ints
    owner_nic: Ints
    chain_start: Ints
    nic: Ints
    gpu: Ints
    nic_in_bytes: Ints
    nic_out_bytes: Ints
    pcie_bytes: Ints


def assign_lanes(packed: Packed, hosts: HostClasses, topology: Topology, rings: Rings) -> Lanes:
    """Deal all buckets."""
    owner = _owners(packed, topology, rings)
    needs = _needs_of_kinds(packed, len(hosts))
    nic, gpu = _dealt_lanes(packed, hosts, owner, needs)
    nic_in = _in_bytes(packed, topology, hosts, nic, needs, lanes=topology.nics, skip_holders=True)
    pcie = _in_bytes(packed, topology, hosts, gpu, needs, lanes=topology.gpus, skip_holders=False)
    owner_nic = _owner_nics(owner, hosts, topology, nic, needs)
    sends = owner != NONE
    nic_out = nic_in.copy()
    np.add.at(nic_out, (owner[sends], owner_nic[sends]), packed.size_bytes[sends])
    chain_start = _chain_starts(packed, rings, topology.nic_gb_s, nic=nic, owner=owner, nic_out=nic_out)
    return Lanes(
        owner=owner,
        owner_nic=owner_nic,
        chain_start=chain_start,
        nic=nic,
        gpu=gpu,
        nic_in_bytes=nic_in,
        nic_out_bytes=nic_out,
        pcie_bytes=pcie,
    )


def _owners(packed: Packed, topology: Topology, rings: Rings) -> Ints:
    """The holder that has sent least, of each bucket that somebody lacks; those with one holder first."""
    sets = topology.holder_sets
    only = np.array([group[0] if len(group) == 1 else NONE for group in sets] or [NONE], dtype=np.int64)
    pairs = packed.receivers * len(sets) + packed.holders
    different, inverse = np.unique(pairs, return_inverse=True)
    needed = np.array([len(rings.remote(pair // len(sets), pair % len(sets))) > 0 for pair in different.tolist()])
    remote = needed[inverse.reshape(-1)] if len(different) else np.zeros(0, dtype=np.bool_)
    owner: Ints = np.where(remote, only[packed.holders], NONE) if len(pairs) else np.zeros(0, dtype=np.int64)
    settled = owner != NONE
    capacity = np.maximum(topology.nics, 1e-9) * topology.nic_gb_s
    load: Floats = sums(owner[settled], packed.size_bytes[settled], topology.hosts) / capacity
    several = {number: np.array(group) for number, group in enumerate(sets) if len(group) > 1}
    for bucket in np.flatnonzero(remote & ~settled).tolist():
        group = several[int(packed.holders[bucket])]
        chosen = int(group[np.argmin(load[group] + packed.size_bytes[bucket] / capacity[group])])
        owner[bucket] = chosen
        load[chosen] += packed.size_bytes[bucket] / capacity[chosen]
    return owner


def _needs_of_kinds(packed: Packed, kinds: int) -> Bools:
    """By receiver set, then bucket: which kinds of hosts receive."""
    bits = [[mask >> kind & 1 for kind in range(kinds)] for mask in packed.pieces.receiver_sets]
    return np.array(bits, dtype=np.bool_).reshape(-1, kinds)[packed.receivers]


def _dealt_lanes(packed: Packed, hosts: HostClasses, owner: Ints, needs: Bools) -> tuple[Ints, Ints]:
    nic = np.full(needs.shape, NONE, dtype=np.int64)
    gpu = np.full(needs.shape, NONE, dtype=np.int64)
    for kind in range(len(hosts)):
        chosen = np.flatnonzero(needs[:, kind])
        nics, gpus = max(int(hosts.nics[kind]), 1), int(hosts.gpus[kind])
        sizes, groups = packed.size_bytes[chosen], owner[chosen]
        most = max(nics, gpus)
        lane = deal(sizes, groups, most)
        # A NIC serves the GPUs next to it, where the numbers allow: then a byte crosses one PCIe switch.
        nic[chosen, kind] = lane * nics // most if most % nics == 0 else deal(sizes, groups, nics)
        gpu[chosen, kind] = lane * gpus // most if most % gpus == 0 else deal(sizes, groups, gpus)
    return nic, gpu


def _in_bytes(
    packed: Packed,
    topology: Topology,
    hosts: HostClasses,
    lane: Ints,
    needs: Bools,
    *,
    lanes: Ints,
    skip_holders: bool,
) -> Ints:
    """Bytes by host and lane; without those that a host has, if asked."""
    width = max(int(lanes.max(initial=1)), 1)
    total = np.zeros((topology.hosts, width), dtype=np.int64)
    sets = len(topology.holder_sets)
    for kind in range(len(hosts)):
        chosen = needs[:, kind]
        key = packed.holders[chosen] * width + lane[chosen, kind]
        by_holders = sums(key, packed.size_bytes[chosen], sets * width).reshape(sets, width)
        total[hosts.hosts_of(kind)] = by_holders.sum(axis=0)
        if skip_holders:
            for number in np.flatnonzero(by_holders.any(axis=1)).tolist():
                for host in topology.holder_sets[number]:
                    if hosts.of_host[host] == kind:
                        total[host] -= by_holders[number]
    return total


def _owner_nics(owner: Ints, hosts: HostClasses, topology: Topology, nic: Ints, needs: Bools) -> Ints:
    """NIC of the GPU that takes it, where the owner needs the bucket too; else the one of the first kind that receives."""
    if not len(owner):
        return owner.copy()
    places = np.arange(len(owner))
    own_kind = hosts.of_host[owner]
    takes = (own_kind >= 0) & needs[places, own_kind]
    kind = np.where(takes, own_kind, np.argmax(needs, axis=1))
    nics = np.maximum(topology.nics[owner], 1)
    lane = nic[places, kind] * nics // np.maximum(hosts.nics[kind], 1)
    return np.where(owner != NONE, lane, NONE)


def _chain_starts(packed: Packed, rings: Rings, nic_gb_s: Floats, *, nic: Ints, owner: Ints, nic_out: Ints) -> Ints:
    """Where each chain begins: so that it ends at the host whose NIC sends most, which then need not forward.

    Takes what is not forwarded off `nic_out`, which counts all that comes in and all that owners send.
    """
    width = nic_out.shape[1]
    rate = np.repeat(nic_gb_s, width)
    seconds = (nic_out.astype(np.float64).ravel()) / rate
    start = np.full(len(owner), NONE, dtype=np.int64)
    of_ring: dict[tuple[int, int], tuple[Ints, Ints]] = {}
    flat = nic_out.reshape(-1)
    sizes, receivers, holders = packed.size_bytes.tolist(), packed.receivers.tolist(), packed.holders.tolist()
    for bucket in np.flatnonzero(owner != NONE).tolist():
        pair = (receivers[bucket], holders[bucket])
        if pair not in of_ring:
            ring = rings.remote(*pair)
            of_ring[pair] = (ring * width, rings.hosts.of_host[ring])
        base, kinds = of_ring[pair]
        lane = base + nic[bucket][kinds]
        last = int(seconds[lane].argmax())
        start[bucket] = (last + 1) % len(base)
        seconds[lane[last]] -= sizes[bucket] / rate[lane[last]]
        flat[lane[last]] -= sizes[bucket]
    return start
