"""What the ways to move an update would take, from lane speeds and a plan: which is fastest, where it is bound, and why.

Seconds are those of the busiest lane plus what comes before lanes are busy; where a plan exists, it is played. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from ckpt_core.errors import ConfigError
from ckpt_core.limits import Limits
from ckpt_core.plan import Plan
from ckpt_core.routing.bounds import LaneKind
from ckpt_core.routing.columns import sums
from ckpt_core.routing.routed import RoutedPlan
from ckpt_core.simulate import FleetRates, HostRates, Simulated, simulate_plan, simulate_routed

_GB = 1e9
_MOST_HOPS_PLAYED = 1_000_000


class Road(Enum):
    """Ways to move an update."""

    PULL = "one-host pull"
    BROADCAST = "broadcast of everything"
    ROUTED = "routed collective"
    P2P = "P2P"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpeeds:
    """GB/s (1e9 bytes a second) of one lane of each kind, all of them busy.

    The defaults are of a host with H200s: PCIe 5 x16 and NVLink as measured, NICs of 400 Gbit/s by their rating.

    Attributes:
        pcie_gb_s: host memory to one GPU; on CPU, memory copies by one process.
        peer_gb_s: what one rank reads from rings on the other GPUs.
        nic_gb_s: one NIC, each way.
        nics: of a host.
        group_s: to make a group of processes for collectives, and its first collective.
    """

    pcie_gb_s: float = 55.0
    peer_gb_s: float = 300.0
    nic_gb_s: float = 50.0
    nics: int = 8
    group_s: float = 1.0

    @classmethod
    def of_limits(cls, limits: Limits, *, agents: int, receivers: int) -> LaneSpeeds:
        """As measured; NICs are not, and keep their default."""
        if not limits.h2d_gb_s or limits.h2d_together_gb_s is None:
            # agents and ranks copy at the same time, and share what the memory carries
            share = limits.memcpy_all_gb_s / max(1, agents + receivers)
            return cls(pcie_gb_s=share, peer_gb_s=share)
        together = limits.h2d_together_gb_s / len(limits.h2d_gb_s)
        peers = [peer.gb_s for peer in limits.peers]
        return cls(pcie_gb_s=min(*limits.h2d_gb_s, together), peer_gb_s=min(peers) if peers else min(limits.d2d_gb_s))

    def changed(self, assignments: Iterable[str]) -> LaneSpeeds:
        """With `pcie=GB/s`, `peer=GB/s`, `nic=GB/s`, `nics=NUMBER` or `group=SECONDS` in place.

        Raises:
            ConfigError: it is none of these.
        """
        speeds = self
        for text in assignments:
            name, _, value = text.partition("=")
            try:
                number = float(value)
                if name not in _SETTABLE or not 0 < number < float("inf"):
                    raise ValueError
                speeds = _with(speeds, name, number)
            except ValueError:
                raise ConfigError(
                    f"lane speed {text!r:.100}: expected one of {', '.join(_SETTABLE)}, =, and a number above 0 "
                    "(GB/s; how many NICs a host has; seconds to make a process group)"
                ) from None
        return speeds

    def host_rates(self, agents: int) -> HostRates:
        """For a simulation of one host."""
        return HostRates(fill_gb_s=(self.pcie_gb_s,) * agents, pull_gb_s=self.peer_gb_s)


_SETTABLE = ("pcie", "peer", "nic", "nics", "group")


def _with(speeds: LaneSpeeds, name: str, number: float) -> LaneSpeeds:
    match name:
        case "pcie":
            return replace(speeds, pcie_gb_s=number)
        case "peer":
            return replace(speeds, peer_gb_s=number)
        case "nic":
            return replace(speeds, nic_gb_s=number)
        case "nics":
            return replace(speeds, nics=max(1, int(number)))
        case _:
            return replace(speeds, group_s=number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One way, and what it would take; `seconds` None where it is not possible."""

    road: Road
    seconds: float | None
    lower_bound_s: float
    bottleneck: str
    bytes_by_lane: Mapping[str, int]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an update should take: to be compared with what it took."""

    seconds: float
    lower_bound_s: float
    bottleneck: str
    busy_s: Mapping[str, float]


def predict(plan: Plan | RoutedPlan, limits: Limits | LaneSpeeds | None = None) -> Prediction:
    """Time of a plan's transfer, first byte to last, without pause, attach and verification.

    Args:
        plan: of one host, or of many.
        limits: measured or given speeds of the lanes within a host; the topology of a routed plan says the others.
    """
    if isinstance(plan, Plan):
        speeds = _speeds(limits, agents=plan.agents, receivers=plan.receivers)
        return _prediction(simulate_plan(plan, speeds.host_rates(plan.agents)), _pcie_bound(plan, speeds))
    speeds = _speeds(limits, agents=1, receivers=1)
    return _prediction(_play(plan, speeds), max(plan.demand.lower_bound_s.values()))


def _speeds(limits: Limits | LaneSpeeds | None, *, agents: int, receivers: int) -> LaneSpeeds:
    if isinstance(limits, Limits):
        return LaneSpeeds.of_limits(limits, agents=agents, receivers=receivers)
    return limits or LaneSpeeds()


def _prediction(played: Simulated, bound_s: float) -> Prediction:
    return Prediction(
        seconds=played.seconds, lower_bound_s=bound_s, bottleneck=played.bottleneck, busy_s=dict(played.busy_s)
    )


def _pcie_bound(plan: Plan, speeds: LaneSpeeds) -> float:
    return plan.size_bytes / (plan.agents * speeds.pcie_gb_s * _GB)


def _play(plan: RoutedPlan, speeds: LaneSpeeds) -> Simulated:
    """Simulate, or for a plan of very many hops, add the way through the longest chain to the busiest lane."""
    rates = FleetRates(pull_gb_s=speeds.peer_gb_s)
    lengths = [
        len(plan.rings.remote(pair // 2**32, pair % 2**32))
        for pair in np.unique(plan.packed.receivers * 2**32 + plan.packed.holders).tolist()
    ]
    longest = max(lengths, default=0)
    if plan.buckets * longest <= _MOST_HOPS_PLAYED:
        return simulate_routed(plan, rates)
    busy = plan.busiest_s()
    slowest = float(plan.topology.nic_gb_s.min()) * _GB
    seconds = max(busy.values()) + longest * (rates.chunk_bytes / slowest + rates.hop_s)
    return Simulated(seconds=seconds, busy_s={kind.value: busy_s for kind, busy_s in busy.items()})


# -- one host --------------------------------------------------------------------------------------------------------------
def alternatives(plan: Plan, speeds: LaneSpeeds) -> list[Alternative]:
    """Ways to do on one host what a plan does, the fastest first; of equal ones, the one that needs the least."""
    total, most = plan.size_bytes, max(plan.bytes_needed_by_receiver)
    most_s = most / (speeds.pcie_gb_s * _GB)
    ranks, needed = plan.receivers, sum(plan.bytes_needed_by_receiver)
    pull = predict(plan, speeds)
    pcie_s = _pcie_bound(plan, speeds)
    everything = total * (ranks - 1) // ranks  # of what a rank has in the end, its own share came over its own bus
    elsewhere = most * (ranks - 1) // ranks
    found = [
        Alternative(
            road=Road.PULL,
            seconds=pull.seconds,
            lower_bound_s=pull.lower_bound_s,
            bottleneck="PCIe" if pull.bottleneck == "agent to ring" else "ring to rank",
            bytes_by_lane={"PCIe, all": total, "peer, into a rank": elsewhere},
            why="each byte crosses PCIe once, dealt evenly; ranks read their slices out of all rings; no process group",
        ),
        _collective(Road.BROADCAST, total, everything, plan.agents, speeds),
        _collective(Road.ROUTED, total, elsewhere, plan.agents, speeds),
        Alternative(
            road=Road.P2P,
            seconds=max(most_s * pull.seconds / pcie_s if pcie_s else 0.0, pull.seconds),
            lower_bound_s=max(most_s, pcie_s),
            bottleneck="PCIe",
            bytes_by_lane={"PCIe, all": needed, "PCIe, one rank": most},
            why="each rank copies its own slices out of the pool: what several ranks need crosses PCIe several times",
        ),
    ]
    return _fastest_first(found)


def _collective(road: Road, total: int, peer: int, agents: int, speeds: LaneSpeeds) -> Alternative:
    pcie_s, peer_s = total / (agents * speeds.pcie_gb_s * _GB), peer / (speeds.peer_gb_s * _GB)
    who = "ranks receive every byte" if road is Road.BROADCAST else "ranks receive their slices"
    return Alternative(
        road=road,
        seconds=max(pcie_s, peer_s) + speeds.group_s,
        lower_bound_s=max(pcie_s, peer_s),
        bottleneck="PCIe" if pcie_s >= peer_s else "peer",
        bytes_by_lane={"PCIe, all": total, "peer, into a rank": peer},
        why=f"{who}, over a process group that takes {speeds.group_s:.1f} s to make",
    )


# -- many hosts ------------------------------------------------------------------------------------------------------------
def routed_alternatives(plan: RoutedPlan, checkpoint_bytes: int, speeds: LaneSpeeds) -> list[Alternative]:
    """Ways to do between hosts what a routed plan does, the fastest first.

    Args:
        checkpoint_bytes: of all tensors: what broadcast sends to every host.
    """
    lacks = plan.demand.lacks_bytes
    need = plan.demand.need_bytes
    played, bound = _play(plan, speeds), max(plan.demand.lower_bound_s.values())
    found = [
        _pools_only(plan, speeds),
        _broadcast(plan, checkpoint_bytes, speeds),
        Alternative(
            road=Road.ROUTED,
            seconds=played.seconds + speeds.group_s * bool(lacks.any()),
            lower_bound_s=bound,
            bottleneck=played.bottleneck,
            bytes_by_lane={"into a host": int(lacks.max()), "PCIe of a host": int(need.max())},
            why="each byte enters each host that needs it once; receivers forward it",
        ),
        _peer_to_peer(plan, speeds),
    ]
    return _fastest_first(found)


def _pools_only(plan: RoutedPlan, speeds: LaneSpeeds) -> Alternative:
    need, lacks = plan.demand.need_bytes, plan.demand.lacks_bytes
    bound = plan.demand.lower_bound_s[LaneKind.PCIE]
    short = int(np.count_nonzero(lacks))
    return Alternative(
        road=Road.PULL,
        seconds=None if short else _play(plan, speeds).seconds,
        lower_bound_s=bound,
        bottleneck=LaneKind.PCIE.value,
        bytes_by_lane={"PCIe of a host": int(need.max())},
        why=f"not possible: {short} hosts lack up to {int(lacks.max()) / _GB:.1f} GB in their own pools"
        if short
        else "every host has all it needs in its own pool",
    )


def _broadcast(plan: RoutedPlan, checkpoint_bytes: int, speeds: LaneSpeeds) -> Alternative:
    """All bytes into every host with ranks, less what it has, and over PCIe into its rings."""
    topology = plan.topology
    with_ranks = np.flatnonzero(plan.hosts.of_host >= 0)
    has = np.zeros(topology.hosts, dtype=np.int64)
    total = sums(plan.packed.holders, plan.packed.size_bytes, len(topology.holder_sets))
    for number, group in enumerate(topology.holder_sets):
        has[list(set(group))] += total[number]
    enters = np.maximum(checkpoint_bytes - has[with_ranks], 0)
    capacity = np.maximum(topology.nics * topology.nic_gb_s, 1e-9)[with_ranks] * _GB
    pcie = (topology.gpus * topology.pcie_gb_s)[with_ranks] * _GB
    nic_s, pcie_s = float((enters / capacity).max()), float((checkpoint_bytes / pcie).max())
    rates = FleetRates()
    way_s = len(with_ranks) * (rates.chunk_bytes / (float(topology.nic_gb_s.min()) * _GB) + rates.hop_s)
    return Alternative(
        road=Road.BROADCAST,
        seconds=max(nic_s, pcie_s) + (way_s + speeds.group_s) * bool(enters.any()),
        lower_bound_s=max(nic_s, pcie_s),
        bottleneck=LaneKind.NIC_IN.value if nic_s >= pcie_s else LaneKind.PCIE.value,
        bytes_by_lane={"into a host": int(enters.max()), "PCIe of a host": checkpoint_bytes},
        why="every byte enters every host, whether its ranks need it or not",
    )


def _peer_to_peer(plan: RoutedPlan, speeds: LaneSpeeds) -> Alternative:
    """Receivers read from those who have it, nobody forwards: owners send each byte to each receiver."""
    topology, sets = plan.topology, len(plan.topology.holder_sets)
    total = sums(
        plan.packed.receivers * sets + plan.packed.holders,
        plan.packed.size_bytes,
        sets * len(plan.packed.pieces.receiver_sets),
    )
    out = np.zeros(topology.hosts)
    for pair in np.flatnonzero(total).tolist():
        group = topology.holder_sets[pair % sets]
        copies = len(plan.rings.remote(pair // sets, pair % sets))
        out[list(set(group))] += total[pair] * copies / len(set(group))
    capacity = np.maximum(topology.nics * topology.nic_gb_s, 1e-9) * _GB
    out_s = float((out / capacity).max())
    bounds = plan.demand.lower_bound_s
    rest = {kind: bounds[kind] for kind in (LaneKind.NIC_IN, LaneKind.PCIE)}
    worst = max(rest, key=lambda kind: rest[kind])
    seconds = max(out_s, rest[worst])
    return Alternative(
        road=Road.P2P,
        seconds=seconds,
        lower_bound_s=seconds,
        bottleneck=LaneKind.NIC_OUT.value if out_s > rest[worst] else worst.value,
        bytes_by_lane={"out of a host": int(out.max()), "into a host": int(plan.demand.lacks_bytes.max())},
        why="receivers read from the pools that have it: those who serve run no code, and send a byte once per receiver",
    )


def _fastest_first(found: Sequence[Alternative]) -> list[Alternative]:
    return sorted(found, key=lambda way: float("inf") if way.seconds is None else way.seconds)
