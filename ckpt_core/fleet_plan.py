"""The plan of an update over all its hosts: to each host one plan of its rings, and what agents pass on between hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from ckpt_core.cost import LaneSpeeds
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan
from ckpt_core.relay import Relay
from ckpt_core.routing.columns import Ints, ints
from ckpt_core.routing.host_plans import host_plans
from ckpt_core.routing.needs import ClassNeeds
from ckpt_core.routing.routed import RoutedPlan, even_bucket_bytes, make_routed_plan
from ckpt_core.routing.topology import Topology

_UNKNOWN_GB_S = 1.0  # where no host's network is known all count the same


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Who does what.

    Attributes:
        plans: by host.
        relays: by host and agent; empty where there is one host.
        host_of: by rank: number of its host.
        network_bytes: by host: what comes in from other hosts.
        routed: what it was read out of; None where there is one host.
        rates_known: whether the speed of every host's network was told.
    """

    plans: tuple[Plan, ...]
    host_of: tuple[int, ...]
    relays: tuple[tuple[Relay, ...], ...] = ()
    network_bytes: tuple[int, ...] = ()
    routed: RoutedPlan | None = None
    rates_known: bool = False

    def plan_of(self, rank: int) -> Plan:
        """That the rank follows."""
        return self.plans[self.host_of[rank]]

    @property
    def lacked_bytes(self) -> tuple[int, ...]:
        """By host: what its ranks need and it does not hold; empty where there is one host."""
        return () if self.routed is None else tuple(self.routed.demand.lacks_bytes.tolist())

    @property
    def structure_digest(self) -> str:
        """Of the manifests it holds for."""
        return self.plans[0].structure_digest

    @property
    def ring_bytes(self) -> int:
        """Size of ring that every host can do its part with."""
        return max(plan.ring_bytes for plan in self.plans)

    @property
    def ring_grew(self) -> bool:
        """Whether a ring is larger than what was asked for."""
        return any(plan.ring_grew for plan in self.plans)

    @property
    def size_bytes(self) -> int:
        """Bytes that go into rings, over all hosts."""
        return sum(plan.size_bytes for plan in self.plans)

    @property
    def needed_bytes(self) -> int:
        """Bytes that ranks need, over all ranks."""
        return sum(sum(plan.bytes_needed_by_receiver) for plan in self.plans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """Who reads the checkpoint.

    Attributes:
        sets: hosts that hold the same tensors.
        of_tensor: which of these sets, by tensor of the manifest.
    """

    sets: tuple[tuple[int, ...], ...]
    of_tensor: Ints

    def one_of(self, tensor: int) -> int:
        """A host that holds it; those that hold the same take turns."""
        members = self.sets[int(self.of_tensor[tensor])]
        return members[tensor % len(members)]

    def names(self, manifest: Manifest, host: int) -> tuple[str, ...]:
        """Tensors that a host holds."""
        held = [host in members for members in self.sets]
        return tuple(
            meta.name for meta, group in zip(manifest.tensors, self.of_tensor.tolist(), strict=True) if held[group]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The hosts of an update, by number.

    Attributes:
        agents: how many each has.
        nic_gb_s: what each one's network carries; 0 where nobody said.
        holders: who reads the checkpoint.
    """

    agents: tuple[int, ...]
    nic_gb_s: tuple[float, ...]
    holders: Holders


def several_hosts(
    manifest: Manifest,
    layouts: Sequence[Layout],
    host_of: Sequence[int],
    hosts: Hosts,
    *,
    ring_bytes: int,
    bucket_bytes: int,
) -> FleetPlan:
    """Plan an update of ranks on several hosts: each byte that a host's ranks need enters the host once.

    Args:
        layouts, host_of: by rank.
        ring_bytes: size of each ring; grows to the largest bucket.
        bucket_bytes: size of a bucket at most, where a tensor may be cut.
    """
    classes: dict[bytes, int] = {}
    rank_class = [classes.setdefault(msgspec.msgpack.encode(layout.entries), len(classes)) for layout in layouts]
    needs = [ClassNeeds.of(layouts[rank_class.index(number)], manifest) for number in range(len(classes))]
    topology = _topology(host_of, rank_class, hosts)
    routed = make_routed_plan(
        manifest, needs, topology, bucket_bytes=min(bucket_bytes, even_bucket_bytes(manifest, topology))
    )
    made = host_plans(routed, manifest, layouts, hosts.agents, ring_bytes=ring_bytes)
    return FleetPlan(
        plans=tuple(host.plan for host in made),
        host_of=tuple(host_of),
        relays=tuple(host.relays for host in made),
        network_bytes=tuple(host.network_bytes for host in made),
        routed=routed,
        rates_known=all(rate > 0 for rate in hosts.nic_gb_s),
    )


def _topology(host_of: Sequence[int], rank_class: Sequence[int], hosts: Hosts) -> Topology:
    with_ranks = set(host_of)
    count = len(hosts.agents)
    rates = [rate or _UNKNOWN_GB_S for rate in hosts.nic_gb_s]
    return Topology(
        rank_host=ints(list(host_of)),
        rank_class=ints(list(rank_class)),
        nics=np.ones(count, dtype=np.int64),
        nic_gb_s=np.array(rates),
        gpus=ints([agents if host in with_ranks else 0 for host, agents in enumerate(hosts.agents)]),
        pcie_gb_s=np.full(count, LaneSpeeds().pcie_gb_s),
        holder_sets=hosts.holders.sets,
        holder_of=hosts.holders.of_tensor,
    )
