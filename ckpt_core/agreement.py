"""How controller, agents and ranks come to one plan, before anything is written.

The long way: every rank says which slices it needs, the controller plans, every rank checks the plan against its own
layout. The short way: the same ranks still know the plan of the last update for the same names, shapes and dtypes; only
rings and content digests are new. A plan of 4695 tensors takes a tenth of a second to make, send and check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt_core import wire
from ckpt_core.agents import AgentGroup
from ckpt_core.config import UpdateConfig
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
    """A plan that was carried out: by whom, and for which structure."""

    plan: Plan
    ranks: tuple[RankKey, ...]

    def fits(self, manifest: Manifest, hellos: Mapping[bytes, wire.RankHello]) -> bool:
        """Whether all these ranks still know it, and it is for this structure."""
        return (
            self.plan.structure_digest == manifest.structure_digest
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
    """What an offer says besides plan and rings."""

    update_id: str
    version: str
    manifest: Manifest
    config: UpdateConfig
    device_kind: DeviceKind


class Agreement:
    """The talk of one update up to the agreed plan.

    Args:
        hellos: ranks in the plan's order.
        name: how to call a rank in messages.
    """

    def __init__(
        self,
        conversation: Conversation,
        agents: AgentGroup,
        hellos: Mapping[bytes, wire.RankHello],
        terms: Terms,
        *,
        name: Callable[[wire.RankHello], str],
    ) -> None:
        self._talk = conversation
        self._agents = agents
        self._hellos = hellos
        self._terms = terms
        self._name = name
        self._timeout_s = terms.config.attach_timeout_s

    def ask_layouts(self) -> list[wire.LayoutReply]:
        """Layouts of all ranks, in order, which fit the checkpoint.

        Raises:
            CoverageError: they do not.
        """
        config, manifest = self._terms.config, self._terms.manifest
        ask = wire.AskLayout(manifest=manifest)
        replies = self._talk.ask(dict.fromkeys(self._hellos, ask), wire.LayoutReply, timeout_s=self._timeout_s)
        check_coverage(
            {self._name(self._hellos[peer]): reply.layout for peer, reply in replies.items()},
            allow_missing=config.allow_missing,
            allow_unexpected=config.allow_unexpected,
        )
        return [replies[peer] for peer in self._hellos]

    def agree_on_new(self, layouts: list[wire.LayoutReply]) -> Plan:
        """Plan, and have everybody take it; with half the ring, and half again, where a device has no room for it.

        Raises:
            CapacityError: not even one bucket fits.
        """
        ring_bytes, bucket_bytes = self._terms.config.ring_for(self._terms.device_kind)
        while True:
            plan = make_plan(
                self._terms.manifest,
                [reply.layout for reply in layouts],
                agents=len(self._agents.peers),
                ring_bytes=ring_bytes,
                bucket_bytes=bucket_bytes,
            )
            for receiver, peer in enumerate(self._hellos):
                self._talk.tell(peer, wire.CheckPlan(plan=plan, receiver=receiver))
            try:
                rings = self._agents.open_rings(plan, self._terms.manifest, timeout_s=self._timeout_s)
            except CapacityError:
                if plan.ring_grew or ring_bytes // 2 < _LEAST_RING_BYTES:
                    raise
                _log.warning("no room for a ring of %d bytes; trying half of it", ring_bytes)
                self._agents.close_rings(timeout_s=self._timeout_s)
                ring_bytes //= 2
                bucket_bytes = min(bucket_bytes, ring_bytes)
            else:
                self._offer(plan, rings)
                return plan

    def agree_on_known(self, plan: Plan) -> None:
        """Have everybody take the plan of the last update again."""
        self._offer(plan, self._agents.open_rings(None, None, timeout_s=self._timeout_s))

    def _offer(self, plan: Plan, rings: tuple[wire.RingOffer, ...]) -> None:
        manifest = self._terms.manifest
        digests = tuple(meta.digest for meta in manifest.tensors)
        offers = {peer: self._offer_to(receiver, digests, rings) for receiver, peer in enumerate(self._hellos)}
        agreed = self._talk.ask(offers, wire.PlanAgreed, timeout_s=self._timeout_s)
        for peer, reply in agreed.items():
            if reply.digest != plan.digest:
                raise PlanError(
                    f"{self._name(self._hellos[peer])} computed plan digest {reply.digest}, expected {plan.digest}; "
                    "install the same ckpt-core on both sides"
                )

    def _offer_to(self, receiver: int, digests: tuple[str, ...], rings: tuple[wire.RingOffer, ...]) -> wire.OfferPlan:
        terms = self._terms
        return wire.OfferPlan(
            digests=digests,
            rings=rings,
            receiver=receiver,
            update_id=terms.update_id,
            version=terms.version,
            digest=version_digest(terms.manifest),
            verify=terms.config.verify_on(terms.device_kind).value,
            fingerprint=terms.config.fingerprint,
            transfer_timeout_s=terms.config.transfer_timeout_s,
            trace=terms.config.trace,
        )
