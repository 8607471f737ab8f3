"""Agents as the controller asks them: on one host or several, one reply from each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckpt_core import wire
from ckpt_core.assign import assign_owners
from ckpt_core.conversation import Conversation
from ckpt_core.errors import PeerLost
from ckpt_core.fleet_plan import FleetPlan, Hosts
from ckpt_core.leaf_digest import Digests
from ckpt_core.plan import Plan
from ckpt_core.plan_parts import NO_PARTS, PlanParts
from ckpt_core.relay import Relay
from ckpt_core.source import SourceIndex

Rings = tuple[tuple[wire.RingOffer, ...], ...]  # by host, by its agents


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPool:
    """What preparing a checkpoint gave.

    Attributes:
        digests: content digests by tensor name.
        parts: `run_digest` of the parts that were asked for, in their order.
        digest_s: seconds of the slowest agent in digests.
        locked_bytes, lock_s: bytes newly page-locked by all agents, and seconds of the slowest.
    """

    digests: Mapping[str, str]
    parts: Digests
    digest_s: float
    locked_bytes: int
    lock_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHost:
    """The agents of one host.

    Attributes:
        name: for people.
        process: where one of them runs.
        peers: by agent.
        nic_gb_s: what its network carries; 0 where nobody said.
    """

    name: str
    process: wire.ProcessInfo
    peers: tuple[bytes, ...]
    nic_gb_s: float = 0.0


class AgentPeers:
    """All agents of an update.

    Attributes:
        hosts: where they are.
        members: how plans see these hosts, once a checkpoint is prepared; None where all is on one host.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.hosts: tuple[AgentHost, ...] = ()
        self.members: Hosts | None = None
        self._stuck = False
        self._ports: dict[bytes, str] = {}

    @property
    def peers(self) -> tuple[bytes, ...]:
        """Peers of the conversation, by host and agent."""
        return tuple(peer for host in self.hosts for peer in host.peers)

    @property
    def alive(self) -> bool:
        """Whether all did what they were last asked to."""
        return not self._stuck

    def check_alive(self) -> None:
        """Raise PeerLost where a process has ended."""

    @property
    def replaced(self) -> Mapping[bytes, str]:
        """Agents whose place another one took, so that they are gone, by what to call them."""
        return {}

    def check_replaced(self) -> None:
        """Raise PeerLost where there are such."""
        for name in self.replaced.values():
            raise PeerLost(f"{name} died during the update; look into its log, then update again")

    def host_of(self, info: wire.ProcessInfo, who: str) -> int:
        """Number of the host whose rings a rank can map.

        Raises:
            TransportError: none of them.
        """
        raise NotImplementedError

    def prepare(
        self, index: SourceIndex, *, digest: bool, parts: PlanParts = NO_PARTS, timeout_s: float
    ) -> PreparedPool:
        """Map the checkpoint in every agent, fit for its device; each digests its share of these parts and, if asked, of all."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let go of all."""
        raise NotImplementedError

    def open_rings(self, size_bytes: int, receivers: int, *, timeout_s: float) -> Rings:
        """A ring of that size in each agent, in place of any before, for at most that many readers."""
        ask = wire.OpenRing(size_bytes=size_bytes, receivers=receivers)
        replies = self._conversation.ask(dict.fromkeys(self.peers, ask), wire.RingOpened, timeout_s=timeout_s)
        self._ports = {peer: reply.port for peer, reply in replies.items()}
        return tuple(tuple(replies[peer].offer for peer in host.peers) for host in self.hosts)

    def tell_plan(self, plan: FleetPlan, secret: str, *, known: bool) -> None:
        """Have all send by this plan, which they know from last time or get now; each answers PlanTaken."""
        everybody = self.peers
        for number, host in enumerate(self.hosts):
            for agent, peer in enumerate(host.peers):
                relay = plan.relays[number][agent] if plan.relays else None
                links = None if relay is None else self._links(relay, everybody, everybody.index(peer), secret)
                sent: Plan | None = None if known else plan.plans[number]
                take = wire.TakePlan(plan=sent, relay=None if known else relay, links=links)
                self._conversation.tell(peer, take)

    def _links(self, relay: Relay, everybody: Sequence[bytes], agent: int, secret: str) -> wire.Links:
        ports = tuple(self._ports[everybody[outlet]] for outlet in relay.outlets)
        return wire.Links(agent=agent, secret=secret, ports=ports)

    def start_sending(self, *, timeout_s: float, trace: bool = False) -> None:
        """Let all send; each answers Sent when its last bucket was read."""
        for peer in self.peers:
            self._conversation.tell(peer, wire.Send(timeout_s=timeout_s, trace=trace))

    def close_rings(self, *, timeout_s: float) -> None:
        """Give ring memory back in every agent, also in the middle of a transfer."""
        alive = [peer for peer in self.peers if peer not in self.replaced]
        asks: Mapping[bytes, wire.AnyMessage] = dict.fromkeys(alive, wire.Abort(cause="the update is over"))
        replies = self._conversation.ask(asks, wire.RingClosed, timeout_s=timeout_s, patient=True)
        self._stuck = self._stuck or len(replies) < len(self.peers)

    def _prepared(self, asks: Mapping[bytes, wire.Prepare], parts: PlanParts, *, timeout_s: float) -> PreparedPool:
        answers = self._conversation.ask(asks, wire.Prepared, timeout_s=timeout_s)
        replies = answers.values()
        return PreparedPool(
            digests={name: digest for reply in replies for name, digest in reply.digests.items()},
            parts=parts.gathered((asks[peer].parts, reply.parts) for peer, reply in answers.items()),
            digest_s=max(reply.digest_s for reply in replies),
            locked_bytes=sum(reply.locked_bytes for reply in replies),
            lock_s=max(reply.lock_s for reply in replies),
        )


def shares(index: SourceIndex, count: int, names: Collection[str] | None = None) -> list[tuple[str, ...]]:
    """Names (None: all) dealt so that bytes are even: largest first, to the least loaded."""
    dealt: list[list[str]] = [[] for _ in range(count)]
    extents = [extent for extent in index.extents if names is None or extent.name in names]
    extents.sort(key=lambda extent: extent.size_bytes, reverse=True)
    owners = assign_owners([extent.size_bytes for extent in extents], count)
    for extent, owner in zip(extents, owners, strict=True):
        dealt[owner].append(extent.name)
    return [tuple(share) for share in dealt]
