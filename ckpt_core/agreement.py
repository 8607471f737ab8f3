"""How controller, agents and ranks come to one plan, before anything is written.

The long way: every rank says which slices it needs, the controller plans, every rank checks the plan against its own
layout. The short way: the same ranks still know the plan of the last update for the same names, shapes and dtypes; only
rings and content digests are new. A plan of 4695 tensors takes some 40 ms to ask for, make, send and check.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt_core import wire
from ckpt_core.agent_peers import AgentPeers, Rings
from ckpt_core.config import Undo, UpdateConfig
from ckpt_core.contract import DeviceKind
from ckpt_core.conversation import Conversation
from ckpt_core.errors import CapacityError, PlanError
from ckpt_core.fleet_plan import FleetPlan, several_hosts
from ckpt_core.layout import Layout, check_coverage
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, make_plan
from ckpt_core.plan_parts import PlanParts

_log = logging.getLogger(__name__)
_LEAST_RING_BYTES = 1 << 20
RankKey = tuple[int, str, int]  # endpoint of the update, engine instance, rank


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPlan:
    """A plan that was carried out: by whom, for which structure, and whether layouts were asked for with replay.

    Attributes:
        parts: of the plan; None where none were digested.
    """

    plan: FleetPlan
    ranks: tuple[RankKey, ...]
    replay: bool
    parts: PlanParts | None = None

    def fits(self, terms: Terms, ranks: Ranks, rings: Rings) -> bool:
        """Whether all these ranks still know it, it is for this structure, and the rings are large enough."""
        return (
            self.replay == terms.config.replay
            and all(offer.size_bytes >= self.plan.ring_bytes for host in rings for offer in host)
            and self.plan.structure_digest == terms.manifest.structure_digest
            and self.ranks == ranks.keys
            and self.plan.host_of == ranks.host_of
            and all(
                hello.known_plan == self.plan.plan_of(rank).digest for rank, hello in enumerate(ranks.hellos.values())
            )
        )


def version_digest(manifest: Manifest) -> str:
    """What a version is bound to: the content, or the structure where the content was not digested."""
    return manifest.digest if manifest.has_content else f"structure-{manifest.structure_digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an offer says besides plan and rings. `structure` is the manifest without digests: a layout needs none."""

    update_id: str
    version: str
    manifest: Manifest
    structure: Manifest
    config: UpdateConfig
    device_kind: DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Who dialled in, in the plan's order, and the number of each one's host."""

    hellos: Mapping[bytes, wire.RankHello]
    host_of: tuple[int, ...]

    @property
    def keys(self) -> tuple[RankKey, ...]:
        """Who they are."""
        return tuple((hello.endpoint_index, hello.rank.instance_id, hello.rank.rank) for hello in self.hellos.values())


class Agreement:
    """The talk of one update up to the agreed plan.

    Args:
        rings: open rings of the agents.
        ranks: in the plan's order.
        name: how to call a rank in messages.
    """

    def __init__(
        self,
        conversation: Conversation,
        agents: AgentPeers,
        rings: Rings,
        ranks: Ranks,
        terms: Terms,
        *,
        name: Callable[[wire.RankHello], str],
    ) -> None:
        self._talk = conversation
        self._agents = agents
        self._rings = rings
        self._hellos = ranks.hellos
        self._host_of = ranks.host_of
        self._terms = terms
        self._name = name
        self._timeout_s = terms.config.attach_timeout_s

    def ask_layouts(self) -> list[wire.LayoutReply]:
        """Layouts of all ranks, in order, which fit the checkpoint.

        Raises:
            CoverageError: they do not.
        """
        config = self._terms.config
        ask = wire.AskLayout(manifest=self._terms.structure, replay=config.replay)
        for rank, peer in enumerate(self._hellos):
            self._talk.tell(peer, wire.MapRings(rings=self._rings_of(rank)))
            self._talk.tell(peer, ask)
        self._terms.manifest.warm()
        wanted = dict.fromkeys(self._hellos, wire.LayoutReply)
        replies = self._talk.gather(wanted, timeout_s=self._timeout_s)
        check_coverage(
            {self._name(self._hellos[peer]): reply.layout for peer, reply in replies.items()},
            allow_missing=config.allow_missing,
            allow_unexpected=config.allow_unexpected,
        )
        return [replies[peer] for peer in self._hellos]

    def agree_on_new(self, layouts: list[wire.LayoutReply]) -> FleetPlan:
        """Plan for the open rings, and have everybody take it; with larger rings where a tensor does not fit into these.

        Raises:
            CapacityError: a device has no room for the larger rings.
        """
        plan = self._plan([reply.layout for reply in layouts])
        if plan.ring_grew:
            self._rings = self._agents.open_rings(plan.ring_bytes, len(self._hellos), timeout_s=self._timeout_s)
        self._offer(plan, known=False)
        return plan

    def _plan(self, layouts: list[Layout]) -> FleetPlan:
        manifest = self._terms.manifest
        ring_bytes = self._rings[0][0].size_bytes
        _, bucket_bytes = self._terms.config.ring_for(self._terms.device_kind)
        bucket_bytes = min(bucket_bytes, ring_bytes)
        if self._agents.members is not None:
            return several_hosts(
                manifest,
                layouts,
                self._host_of,
                self._agents.members,
                ring_bytes=ring_bytes,
                bucket_bytes=bucket_bytes,
            )
        agents = len(self._agents.peers)
        plan = make_plan(manifest, layouts, agents=agents, ring_bytes=ring_bytes, bucket_bytes=bucket_bytes)
        return FleetPlan(plans=(plan,), host_of=self._host_of)

    def agree_on_known(self, plan: FleetPlan) -> None:
        """Have everybody take the plan of the last update again."""
        self._offer(plan, known=True)

    def _offer(self, plan: FleetPlan, *, known: bool) -> None:
        expected: dict[bytes, str] = {}
        for rank, peer in enumerate(self._hellos):
            mine = plan.plan_of(rank)
            expected[peer] = mine.digest
            self._talk.tell(peer, self._offer_of(None if known else mine, self._rings_of(rank)))
        for host, its_plan in zip(self._agents.hosts, plan.plans, strict=True):
            expected |= dict.fromkeys(host.peers, its_plan.digest)
        self._agents.tell_plan(plan, secrets.token_hex(16), known=known)
        wanted: dict[bytes, type[wire.PlanAgreed | wire.PlanTaken]] = dict.fromkeys(self._hellos, wire.PlanAgreed)
        wanted |= dict.fromkeys(self._agents.peers, wire.PlanTaken)
        for peer, reply in self._talk.gather(wanted, timeout_s=self._timeout_s).items():
            assert isinstance(reply, wire.PlanAgreed | wire.PlanTaken)
            if reply.digest != expected[peer]:
                who = self._name(self._hellos[peer]) if peer in self._hellos else "an agent"
                raise PlanError(
                    f"{who} computed plan digest {reply.digest}, expected {expected[peer]}; install the same ckpt-core on "
                    "both sides"
                )

    def _rings_of(self, rank: int) -> wire.RingSet:
        host = self._host_of[rank]
        return wire.RingSet(
            offers=self._rings[host],
            receiver=self._host_of[:rank].count(host),
            receivers=self._host_of.count(host),
        )

    def _offer_of(self, plan: Plan | None, rings: wire.RingSet) -> wire.OfferPlan:
        terms = self._terms
        return wire.OfferPlan(
            plan=plan,
            rings=rings,
            update_id=terms.update_id,
            version=terms.version,
            digest=version_digest(terms.manifest),
            verify=terms.config.level.value,
            fingerprint=terms.config.fingerprint,
            transfer_timeout_s=terms.config.transfer_timeout_s,
            trace=terms.config.trace,
            snapshot=terms.config.undo is Undo.SNAPSHOT,
        )


def open_rings(agents: AgentPeers, *, size_bytes: int, receivers: int, timeout_s: float) -> Rings:
    """Rings of that size; of half of it, and half again, where a device has no room. Before anything is paused.

    Raises:
        CapacityError: not even a small one fits.
    """
    while True:
        try:
            return agents.open_rings(size_bytes, receivers, timeout_s=timeout_s)
        except CapacityError:
            agents.close_rings(timeout_s=timeout_s)
            if size_bytes // 2 < _LEAST_RING_BYTES or not agents.alive:
                raise
            _log.warning("no room for a ring of %d bytes; trying half of it", size_bytes)
            size_bytes //= 2
