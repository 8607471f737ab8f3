"""A group of agent processes, as the controller sees it: started, asked, stopped, never left behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ckpt_core import process, wire
from ckpt_core.agent import AgentConfig
from ckpt_core.agent_peers import AgentHost, AgentPeers, PreparedPool, shares
from ckpt_core.agent_process import end, spawn
from ckpt_core.conversation import Conversation
from ckpt_core.errors import PeerLost
from ckpt_core.plan_parts import NO_PARTS, PlanParts
from ckpt_core.shm import private_directory, remove_directory
from ckpt_core.source import SourceIndex


class AgentGroup(AgentPeers):
    """Agents 0 .. n-1, each a child process of this one.

    Args:
        devices: where the ring of each lives: "cpu" or the UUID of a GPU.
        conversation: over which they are asked.
        directory: 0700 directory for their shared memory.
        token: they prove themselves with.
        silence_timeout_s, log_level: see AgentConfig.
        orphans: directories that agents remove, with `directory`, when this process is gone without having done so.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        conversation: Conversation,
        directory: Path,
        token: str,
        silence_timeout_s: float,
        orphans: Sequence[Path] = (),
        log_level: str = "WARNING",
    ) -> None:
        super().__init__(conversation)
        self.devices = tuple(devices)
        self._token = token
        self._hellos: dict[bytes, wire.AgentHello] = {}
        conversation.listen_to(token, agents=True)
        self._directory = private_directory(directory, "agents-")
        self._children = [
            spawn(
                AgentConfig(
                    address=conversation.address,
                    token=token,
                    index=index,
                    count=len(devices),
                    directory=str(self._directory),
                    device=device,
                    parent=os.getpid(),
                    orphans=(str(directory), *map(str, orphans)),
                    silence_timeout_s=silence_timeout_s,
                    log_level=log_level,
                )
            )
            for index, device in enumerate(devices)
        ]

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, by agent."""
        return tuple(child.pid for child in self._children)

    @property
    def alive(self) -> bool:
        """Whether all processes run, and did what they were last asked to."""
        return not self._stuck and all(child.poll() is None for child in self._children)

    def check_alive(self) -> None:
        """Raise PeerLost where a process has ended."""
        for index, child in enumerate(self._children):
            if (status := child.poll()) is not None:
                raise PeerLost(f"agent {index} ended with status {status}; its standard error says why; update again")

    def join(self, timeout_s: float) -> None:
        """Wait until all dialled in."""
        self._conversation.watches.append(self._check_started)
        try:
            self._conversation.admit(
                wire.AgentHello, len(self._children), timeout_s=timeout_s, who="agent", into=self._hellos
            )
        finally:
            self._conversation.watches.remove(self._check_started)
        hellos = self._hellos
        by_index = {hello.agent: peer for peer, hello in hellos.items()}
        peers = tuple(by_index[index] for index in range(len(self._children)))
        mine = process.current()
        for index, peer in enumerate(peers):
            process.check_can_share(mine, hellos[peer].process, f"agent {index}")
            self._conversation.introduce(peer, hellos[peer].process, f"agent {index}")
        self.hosts = (AgentHost(name=mine.host, process=mine, peers=peers),)

    def host_of(self, info: wire.ProcessInfo, who: str) -> int:
        """See AgentPeers: this host, or none."""
        process.check_can_share(self.hosts[0].process, info, who)
        return 0

    def _check_started(self) -> None:
        for index, child in enumerate(self._children):
            if (status := child.poll()) is not None:
                raise PeerLost(
                    f"agent {index} ended with status {status} before it dialled in; its standard error says why"
                )

    def prepare(
        self, index: SourceIndex, *, digest: bool, parts: PlanParts = NO_PARTS, timeout_s: float
    ) -> PreparedPool:
        """See AgentPeers."""
        count = len(self.peers)
        named = shares(index, count) if digest else [()] * count
        asks = {
            peer: wire.Prepare(index=index, digest=names, parts=some)
            for peer, names, some in zip(self.peers, named, parts.dealt([count])[0], strict=True)
        }
        return self._prepared(asks, parts, timeout_s=timeout_s)

    def stop(self) -> None:
        """End all processes."""
        for peer in self._hellos:
            self._conversation.tell(peer, wire.Stop())
        self._conversation.dismiss(self._hellos, self._token)
        end(self._children)
        remove_directory(self._directory)  # rings of agents that could not remove them
