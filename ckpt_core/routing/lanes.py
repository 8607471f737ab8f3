"""Deals buckets to lanes so that they carry even bytes, and chains the hosts that receive one.

A bucket goes to its receivers along a chain: its owner sends it once, each receiver but the last forwards it once, as it
comes in. So no NIC sends more than it receives, however many hosts there are, where a binomial tree would send log2(hosts)
times as much from its root. Where the owners are receivers themselves, with different parts, a chain begins behind its owner
and all of them send all the time: the ring all-gather (Chan, Heimlich, Purkayastha, van de Geijn 2007, "Collective communication:
theory, practice, and experience"; van de Geijn's broadcast of long messages is a scatter and then this). Where others own, it
is the pipelined chain. Two complementary trees (Sanders, Speck, Traeff 2009, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan") have the same throughput at a depth of log2(hosts); the chain is simpler, and the way through it is short
against the update.

Lanes serve buckets in the order of `slot` plus hops from the owner. In one order for all hosts (that of the buckets, say), hosts
would wait for each other all round the ring: simulated, 512 hosts then took 2 to 20 times as long. Along a chain this
order only grows, so no two hosts wait for each other.
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
# Rounds begin before the last one has gone all round: the less of it has, the evener lanes are, and the deeper rings must be.
# Simulated at 512 hosts: 1.0 needs rings of 8 to 11 buckets, 0.3 of 15 to 20 and takes 12 to 14 % less time.
_OVERLAP = 0.3


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
        slot: when its owner sends it; a host h hops behind the owner gets it in slot + h.
        nic: by bucket and kind of host: NIC that it comes in and is forwarded by.
        gpu: by bucket and kind of host: GPU whose ring it goes to.
        nic_in_bytes, nic_out_bytes: by host and NIC.
        pcie_bytes: by host and GPU.
    """

    owner: Ints
    owner_nic: Ints
    chain_start: Ints
    slot: Ints
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
    chain_start = _chain_starts(packed, rings, nic=nic, owner=owner, nic_out=nic_out)
    return Lanes(
        owner=owner,
        owner_nic=owner_nic,
        chain_start=chain_start,
        slot=_slots(packed, owner, owner_nic, nic_in),
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


def _chain_starts(packed: Packed, rings: Rings, *, nic: Ints, owner: Ints, nic_out: Ints) -> Ints:
    """Where each chain begins: behind its owner if that is one of those who forward, else at the first of the ring.

    Takes what is not forwarded, at the end of each chain, off `nic_out`.
    """
    width = nic_out.shape[1]
    flat = nic_out.reshape(-1)
    sends = owner != NONE
    forwards = nic_out.sum(axis=1) > sums(owner[sends], packed.size_bytes[sends], len(nic_out))
    start = np.full(len(owner), NONE, dtype=np.int64)
    sizes, receivers, holders = packed.size_bytes.tolist(), packed.receivers.tolist(), packed.holders.tolist()
    for bucket in np.flatnonzero(sends).tolist():
        ring = rings.remote(receivers[bucket], holders[bucket])
        first = int(np.searchsorted(ring, owner[bucket])) if forwards[owner[bucket]] else 0
        start[bucket] = first % len(ring)
        last = int(ring[start[bucket] - 1])
        flat[last * width + nic[bucket, rings.hosts.of_host[last]]] -= sizes[bucket]
    return start


def _slots(packed: Packed, owner: Ints, owner_nic: Ints, nic_in: Ints) -> Ints:
    """When each bucket starts, in buckets: one of each owner's NIC a round, and a round as long as receivers need for it.

    In each round different owners send to different sets of receivers, else some receivers would wait while others are
    busy. What nobody sends is spread over the same time.
    """
    sends = np.flatnonzero(owner != NONE)
    slot = np.zeros(len(owner), dtype=np.int64)
    end = len(owner)
    if len(sends):
        lane = owner[sends] * nic_in.shape[1] + owner_nic[sends]
        turn = _turns(lane, _mixed(packed, sends, owner[sends], lane))
        received = int(nic_in.max()) / max(float(packed.size_bytes[sends].mean()), 1.0)
        slot[sends] = turn * max(1, round(_OVERLAP * received / (int(turn.max()) + 1)))
        end = int(slot.max()) + 1
    alone = np.flatnonzero(owner == NONE)
    slot[alone] = alone * end // max(len(owner), 1)
    return slot


def _mixed(packed: Packed, sends: Ints, owner: Ints, lane: Ints) -> Floats:
    """What a lane's buckets are sent in the order of: those of each receiver set evenly over the lane's time, and in
    another phase by the next owner."""
    receivers = packed.receivers[sends]
    sets = len(packed.pieces.receiver_sets)
    size = sums(receivers, packed.size_bytes[sends], sets)
    rank = np.argsort(np.argsort(-size, kind="stable"), kind="stable")
    large = max(1, int((size * 4 * sets > size.sum()).sum()))
    phase = (owner + rank[receivers]) % large / large
    _, which, number = np.unique(lane * sets + receivers, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    mixed: Floats = (_turns(which, sends) + phase) / number[which]
    return mixed


def _turns(key: Ints, order: Ints | Floats) -> Ints:
    """Place of each among those of the same key, in that order."""
    grouped = np.lexsort((order, key))
    _, begin, group = np.unique(key[grouped], return_index=True, return_inverse=True)
    turn = np.empty(len(key), dtype=np.int64)
    turn[grouped] = np.arange(len(key)) - begin[group.reshape(-1)]
    return turn
