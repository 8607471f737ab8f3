"""How controller, agents and ranks come to one plan, before anything is written.

The long way: every rank says which slices it needs, the controller plans, every rank checks the plan against its own
layout. The short way: the same ranks still know the plan of the last update for the same names, shapes and dtypes; only
rings and content digests are new. A plan of 4695 tensors takes some 40 ms to ask for, make, send and check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckpt_core import wire
from ckpt_core.agents import AgentGroup
from ckpt_core.config import UpdateConfig, VerifyLevel
from ckpt_core.contract import DeviceKind
from ckpt_core.conversation import Conversation
from ckpt_core.errors import CapacityError, PlanError
from ckpt_core.layout import check_coverage
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, make_plan

_log = logging.getLogger(__name__)
_LEAST_RING_BYTES = 1 << 20
RankKey = tuple[int, str, int]  # endpoint of the update, engine instance, rank


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPlan:
    """A plan that was carried out: by whom, for which structure, and how layouts were asked for."""

    plan: Plan
    ranks: tuple[RankKey, ...]
    asked: tuple[bool, bool]

    def fits(self, terms: Terms, hellos: Mapping[bytes, wire.RankHello], rings: tuple[wire.RingOffer, ...]) -> bool:
        """Whether all these ranks still know it, it is for this structure, and the rings are large enough."""
        return (
            self.asked == terms.asked
            and all(ring.size_bytes >= self.plan.ring_bytes for ring in rings)
            and self.plan.structure_digest == terms.manifest.structure_digest
            and self.ranks == rank_keys(hellos)
            and all(hello.known_plan == self.plan.digest for hello in hellos.values())
        )


def version_digest(manifest: Manifest) -> str:
    """What a version is bound to: the content, or the structure where the content was not digested."""
    return manifest.digest if manifest.has_content else f"structure-{manifest.structure_digest}"


def rank_keys(hellos: Mapping[bytes, wire.RankHello]) -> tuple[RankKey, ...]:
    """Who they are, in order."""
    return tuple((hello.endpoint_index, hello.rank.instance_id, hello.rank.rank) for hello in hellos.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an offer says besides plan and rings. `structure` is the manifest without digests: a layout needs none."""

    update_id: str
    version: str
    manifest: Manifest
    structure: Manifest
    config: UpdateConfig
    device_kind: DeviceKind

    @property
    def asked(self) -> tuple[bool, bool]:
        """How layouts are asked for: whether to replay, and only slices. The digest of a tensor needs all of it."""
        return self.config.replay, self.config.verify_on(self.device_kind) is not VerifyLevel.ARRIVAL


class Agreement:
    """The talk of one update up to the agreed plan.

    Args:
        rings: open rings of the agents.
        hellos: ranks in the plan's order.
        name: how to call a rank in messages.
    """

    def __init__(
        self,
        conversation: Conversation,
        agents: AgentGroup,
        rings: tuple[wire.RingOffer, ...],
        hellos: Mapping[bytes, wire.RankHello],
        terms: Terms,
        *,
        name: Callable[[wire.RankHello], str],
    ) -> None:
        self._talk = conversation
        self._agents = agents
        self._rings = rings
        self._hellos = hellos
        self._terms = terms
        self._name = name
        self._timeout_s = terms.config.attach_timeout_s

    def ask_layouts(self) -> list[wire.LayoutReply]:
        """Layouts of all ranks, in order, which fit the checkpoint.

        Raises:
            CoverageError: they do not.
        """
        config = self._terms.config
        replay, slices = self._terms.asked
        ask = wire.AskLayout(manifest=self._terms.structure, replay=replay, slices=slices)
        for receiver, peer in enumerate(self._hellos):
            self._talk.tell(peer, wire.MapRings(rings=self._rings_of(receiver)))
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

    def agree_on_new(self, layouts: list[wire.LayoutReply]) -> Plan:
        """Plan for the open rings, and have everybody take it; with larger rings where a tensor does not fit into these.

        Raises:
            CapacityError: a device has no room for the larger rings.
        """
        manifest = self._terms.manifest
        ring_bytes = self._rings[0].size_bytes
        _, bucket_bytes = self._terms.config.ring_for(self._terms.device_kind)
        plan = make_plan(
            manifest,
            [reply.layout for reply in layouts],
            agents=len(self._agents.peers),
            ring_bytes=ring_bytes,
            bucket_bytes=min(bucket_bytes, ring_bytes),
        )
        if plan.ring_grew:
            self._rings = self._agents.open_rings(plan.ring_bytes, len(self._hellos), timeout_s=self._timeout_s)
        self._offer(plan, sent=plan)
        return plan

    def agree_on_known(self, plan: Plan) -> None:
        """Have everybody take the plan of the last update again."""
        self._offer(plan, sent=None)

    def _offer(self, plan: Plan, *, sent: Plan | None) -> None:
        for receiver, peer in enumerate(self._hellos):
            self._talk.tell(peer, self._offer_of(sent, self._rings_of(receiver)))
        self._agents.tell_plan(sent)
        wanted: dict[bytes, type[wire.PlanAgreed | wire.PlanTaken]] = dict.fromkeys(self._hellos, wire.PlanAgreed)
        wanted |= dict.fromkeys(self._agents.peers, wire.PlanTaken)
        for peer, reply in self._talk.gather(wanted, timeout_s=self._timeout_s).items():
            assert isinstance(reply, wire.PlanAgreed | wire.PlanTaken)
            if reply.digest != plan.digest:
                who = self._name(self._hellos[peer]) if peer in self._hellos else "an agent"
                raise PlanError(
                    f"{who} computed plan digest {reply.digest}, expected {plan.digest}; install the same ckpt-core on both sides"
                )

    def _rings_of(self, receiver: int) -> wire.RingSet:
        return wire.RingSet(offers=self._rings, receiver=receiver, receivers=len(self._hellos))

    def _offer_of(self, plan: Plan | None, rings: wire.RingSet) -> wire.OfferPlan:
        terms = self._terms
        verify = terms.config.verify_on(terms.device_kind)
        return wire.OfferPlan(
            plan=plan,
            digests=self._digests if verify is VerifyLevel.ARRIVAL else (),
            rings=rings,
            update_id=terms.update_id,
            version=terms.version,
            digest=version_digest(terms.manifest),
            verify=verify.value,
            fingerprint=terms.config.fingerprint,
            transfer_timeout_s=terms.config.transfer_timeout_s,
            trace=terms.config.trace,
        )

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        return tuple(meta.digest for meta in self._terms.manifest.tensors)


def open_rings(agents: AgentGroup, *, size_bytes: int, receivers: int, timeout_s: float) -> tuple[wire.RingOffer, ...]:
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
