"""What no plan can beat: bytes that must cross, by the capacity of what they must cross. Knows nothing of buckets and lanes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from ckpt_core.routing.columns import Floats, Ints, sums
from ckpt_core.routing.host_classes import HostClasses
from ckpt_core.routing.pieces import Pieces
from ckpt_core.routing.topology import Topology

_GB = 1e9


class LaneKind(Enum):
    """Where bytes cross."""

    NIC_IN = "NIC into a host"
    NIC_OUT = "NIC out of a host"
    PCIE = "PCIe of a GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the hosts of an update need.

    Attributes:
        need_bytes: by host.
        lacks_bytes: by host: what of it is not in its own pool.
        lower_bound_s: by kind of lane.
    """

    need_bytes: Ints
    lacks_bytes: Ints
    lower_bound_s: Mapping[LaneKind, float]


def measure_demand(pieces: Pieces, hosts: HostClasses, topology: Topology) -> Demand:
    """Bytes needed, and the bound of each kind of lane."""
    sets = len(topology.holder_sets)
    key = topology.holder_of[pieces.tensor] * len(pieces.receiver_sets) + pieces.receivers
    total = sums(key, pieces.size_bytes, sets * len(pieces.receiver_sets)).reshape(sets, -1)
    bits = [[mask >> kind & 1 for kind in range(len(hosts))] for mask in pieces.receiver_sets]
    # by holder set and kind of host; hosts without ranks read the last column
    by_kind = np.zeros((sets, len(hosts) + 1), dtype=np.int64)
    by_kind[:, :-1] = total @ np.array(bits, dtype=np.int64).reshape(-1, len(hosts))
    need = by_kind.sum(axis=0)[hosts.of_host]
    lacks = need.copy()
    for number, group in enumerate(topology.holder_sets):
        members = np.unique(np.array(group, dtype=np.int64))
        lacks[members] -= by_kind[number, hosts.of_host[members]]
    nic = topology.nics * topology.nic_gb_s * _GB
    bounds = {
        LaneKind.NIC_IN: _worst(lacks, nic),
        LaneKind.NIC_OUT: max(_worst_total(lacks, nic), _worst_holders(_leaving(total, pieces, hosts, topology), nic)),
        LaneKind.PCIE: _worst(need, topology.gpus * topology.pcie_gb_s * _GB),
    }
    return Demand(need_bytes=need, lacks_bytes=lacks, lower_bound_s=bounds)


def _worst(size: Ints, capacity: Floats) -> float:
    return float(np.divide(size, capacity, out=np.zeros(len(size)), where=(size > 0) & (capacity > 0)).max(initial=0.0))


def _worst_total(lacks: Ints, nic: Floats) -> float:
    """All that comes in somewhere goes out somewhere."""
    return float(lacks.sum()) / float(nic.sum()) if nic.any() else 0.0


def _leaving(total: Ints, pieces: Pieces, hosts: HostClasses, topology: Topology) -> dict[frozenset[int], int]:
    """By the hosts that have them: bytes that somebody else needs, so that they leave one of these at least once."""
    receivers = [frozenset(hosts.hosts_of_set(mask).tolist()) for mask in pieces.receiver_sets]
    leaving: dict[frozenset[int], int] = {}
    for row, group in zip(total, map(frozenset, topology.holder_sets), strict=True):
        size = sum(int(count) for count, to in zip(row, receivers, strict=True) if count and not to <= group)
        leaving[group] = leaving.get(group, 0) + size
    return leaving


def _worst_holders(leaving: Mapping[frozenset[int], int], nic: Floats) -> float:
    """A group of hosts sends at least what only its members have."""
    worst = 0.0
    for group, alone in leaving.items():
        inside = alone if len(group) == 1 else sum(size for other, size in leaving.items() if other <= group)
        capacity = float(nic[sorted(group)].sum())
        if inside and capacity:
            worst = max(worst, inside / capacity)
    return worst
