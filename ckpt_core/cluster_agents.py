"""Agents of several hosts: each host's service started them, they dial in, and the controller waits until all are there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ckpt_core import process, wire
from ckpt_core.agent_peers import AgentHost, AgentPeers, PreparedPool, shares
from ckpt_core.config import Reading
from ckpt_core.conversation import Conversation
from ckpt_core.errors import ConfigError, RendezvousTimeout, TransportError
from ckpt_core.fleet_plan import Holders, Hosts
from ckpt_core.manifest import Manifest
from ckpt_core.plan_parts import NO_PARTS, PlanParts
from ckpt_core.routing.columns import ints
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.topology import striped
from ckpt_core.source import SourceIndex

_HostKey = tuple[str, str, str]


class ClusterAgents(AgentPeers):
    """Agents that dialled in.

    Args:
        conversation: over which they are asked.
        token: they prove themselves with.
        reading: which hosts read checkpoints.
    """

    def __init__(self, conversation: Conversation, *, token: str, reading: Reading) -> None:
        super().__init__(conversation)
        self._reading = reading
        self._token = token
        conversation.listen_to(token, agents=True)

    def join(self, hosts: int, timeout_s: float) -> None:
        """Wait for all agents of that many hosts.

        Raises:
            RendezvousTimeout: they did not come.
            ConfigError: more are there.
        """
        deadline = time.monotonic() + timeout_s
        while len(found := _complete(self._conversation.agents)) < hosts:
            if time.monotonic() > deadline:
                names = ", ".join(host.name for host in found) or "none"
                raise RendezvousTimeout(
                    f"agents of {len(found)} of {hosts} hosts dialled in within {timeout_s:g} s ({names}); run `ckpt agent` on "
                    "each host that has engines or reads the checkpoint"
                )
            self._conversation.idle_until(lambda: False, timeout_s=0.05)
        if len(found) > hosts:
            names = ", ".join(host.name for host in found)
            raise ConfigError(
                f"{hosts} hosts are to take part, and agents of {len(found)} are there: {names}; give their number"
            )
        self.hosts = tuple(found)
        for host in self.hosts:
            for agent, peer in enumerate(host.peers):
                hello = self._conversation.agents[peer]
                self._conversation.introduce(peer, hello.process, f"agent {agent} of host {host.name}")

    def host_of(self, info: wire.ProcessInfo, who: str) -> int:
        """See AgentPeers. A container that shares memory with its host's agents may have a network of its own."""
        keys = [_key(host.process) for host in self.hosts]
        mine = _key(info)
        near = [number for number, key in enumerate(keys) if key == mine]
        near = near or [number for number, key in enumerate(keys) if key[:2] == mine[:2]]
        if not near:
            raise TransportError(f"{who} runs on host {info.host}, where no agent is; run `ckpt agent` there")
        process.check_can_share(self.hosts[near[0]].process, info, who)
        return near[0]

    def prepare(
        self, index: SourceIndex, *, digest: bool, parts: PlanParts = NO_PARTS, timeout_s: float
    ) -> PreparedPool:
        """See AgentPeers. Each host maps what it is to read."""
        manifest = Manifest.from_index(index)
        holders = self._holders(manifest)
        self.members = Hosts(
            agents=tuple(len(host.peers) for host in self.hosts),
            nic_gb_s=tuple(host.nic_gb_s for host in self.hosts),
            holders=holders,
        )
        everywhere = self._reading is Reading.EVERYWHERE
        by_host = shares(index, len(self.hosts)) if everywhere else []
        of_parts = parts.dealt(self.members.agents, lambda part: holders.one_of(part.tensor))
        asks: dict[bytes, wire.Prepare] = {}
        for number, host in enumerate(self.hosts):
            holds = holders.names(manifest, number)
            digested = (by_host[number] if everywhere else holds) if digest else ()
            named = shares(index, len(host.peers), frozenset(digested))
            for peer, names, some in zip(host.peers, named, of_parts[number], strict=True):
                asks[peer] = wire.Prepare(index=index, digest=names, holds=holds, parts=some)
        return self._prepared(asks, parts, timeout_s=timeout_s)

    def _holders(self, manifest: Manifest) -> Holders:
        everybody = tuple(range(len(self.hosts)))
        if self._reading is Reading.STRIPED:
            holder_of = striped(manifest, natural_order(manifest), len(everybody))
            return Holders(sets=tuple((host,) for host in everybody), of_tensor=holder_of)
        sets = (everybody,) if self._reading is Reading.EVERYWHERE else ((self._here(),),)
        return Holders(sets=sets, of_tensor=ints([0] * len(manifest.tensors)))

    def _here(self) -> int:
        mine = _key(process.current())
        for number, host in enumerate(self.hosts):
            if _key(host.process) == mine:
                return number
        raise ConfigError(
            "the checkpoint is to be read on this host, and no agent of the cluster runs here; run `ckpt agent` here, or let "
            "hosts read it from a file system that all have (reading STRIPED or EVERYWHERE)"
        )

    def stop(self) -> None:
        """Send all home: their services start new ones, which dial in again."""
        peers = tuple(self._conversation.agents)
        for peer in peers:
            self._conversation.tell(peer, wire.Stop())
        self._conversation.dismiss(peers)
        self.hosts = ()

    @property
    def alive(self) -> bool:
        """See AgentPeers; and whether none of them was started anew since."""
        self._conversation.idle_until(lambda: False, timeout_s=0.0)
        return super().alive and not self.replaced

    @property
    def replaced(self) -> Mapping[bytes, str]:
        """See AgentPeers: a service starts an agent anew when the one before is gone."""
        known = self._conversation.agents
        mine = {_place(known[peer]): peer for peer in self.peers if peer in known}
        taken = {_place(hello): hello for peer, hello in known.items() if peer not in self.peers}
        return {
            mine[place]: f"agent {hello.agent} of host {hello.process.host} ({hello.address})"
            for place, hello in taken.items()
            if place in mine
        }


def _key(info: wire.ProcessInfo) -> _HostKey:
    return info.boot_id, info.ipc_namespace, info.net_namespace


def _place(hello: wire.AgentHello) -> tuple[_HostKey, str, int]:
    return _key(hello.process), hello.address, hello.agent


def _complete(hellos: dict[bytes, wire.AgentHello]) -> Sequence[AgentHost]:
    """Hosts of which all agents are there, by address. An agent that was started again replaces the one before."""
    by_host: dict[tuple[_HostKey, str], dict[int, bytes]] = {}
    for peer, hello in hellos.items():
        agents = by_host.setdefault((_key(hello.process), hello.address), {})
        if any(hellos[other].count != hello.count for other in agents.values()):
            agents.clear()  # the service was started again with more of them, or fewer
        agents[hello.agent] = peer
    found = []
    for agents in by_host.values():
        first = hellos[next(iter(agents.values()))]
        if sorted(agents) == list(range(first.count)):
            peers = tuple(agents[agent] for agent in range(first.count))
            name = f"{first.process.host} ({first.address})"
            found.append(AgentHost(name=name, process=first.process, peers=peers, nic_gb_s=first.nic_gb_s))
    return sorted(found, key=lambda host: host.name)
