"""A group of agent processes, as the controller sees it: started, asked, stopped, never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ckpt_core import wire
from ckpt_core.agent import AgentConfig
from ckpt_core.config import child_environment
from ckpt_core.conversation import Conversation
from ckpt_core.device import CPU
from ckpt_core.errors import PeerLost
from ckpt_core.plan import Plan
from ckpt_core.shm import private_directory, remove_directory
from ckpt_core.source import SourceIndex

_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPool:
    """What preparing a checkpoint gave.

    Attributes:
        digests: content digests by tensor name.
        digest_s: seconds of the slowest agent in digests.
        locked_bytes, lock_s: bytes newly page-locked by all agents, and seconds of the slowest.
    """

    digests: Mapping[str, str]
    digest_s: float
    locked_bytes: int
    lock_s: float


class AgentGroup:
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
        self._conversation = conversation
        self.devices = tuple(devices)
        self._token = token
        self._stuck = False
        conversation.listen_to(token)
        self._directory = private_directory(directory, "agents-")
        self._children = [
            _spawn(
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
        self._peers: list[bytes] = []

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

    @property
    def peers(self) -> tuple[bytes, ...]:
        """Peers of the conversation, by agent."""
        return tuple(self._peers)

    def join(self, timeout_s: float) -> None:
        """Wait until all dialled in."""
        self._conversation.watches.append(self._check_started)
        try:
            hellos = self._conversation.admit(wire.AgentHello, len(self._children), timeout_s=timeout_s, who="agent")
        finally:
            self._conversation.watches.remove(self._check_started)
        by_index = {hello.agent: peer for peer, hello in hellos.items()}
        self._peers = [by_index[index] for index in range(len(self._children))]
        for index, peer in enumerate(self._peers):
            self._conversation.introduce(peer, hellos[peer].process, f"agent {index}")

    def _check_started(self) -> None:
        for index, child in enumerate(self._children):
            if (status := child.poll()) is not None:
                raise PeerLost(
                    f"agent {index} ended with status {status} before it dialled in; its standard error says why"
                )

    def prepare(self, index: SourceIndex, *, digest: bool, timeout_s: float) -> PreparedPool:
        """Map the checkpoint in every agent, fit for its device; each digests its share, if asked."""
        shares = _shares(index, len(self._peers))
        asks: Mapping[bytes, wire.AnyMessage] = {
            peer: wire.Prepare(index=index, digest=share if digest else ())
            for peer, share in zip(self._peers, shares, strict=True)
        }
        replies = self._conversation.ask(asks, wire.Prepared, timeout_s=timeout_s).values()
        return PreparedPool(
            digests={name: digest for reply in replies for name, digest in reply.digests.items()},
            digest_s=max(reply.digest_s for reply in replies),
            locked_bytes=sum(reply.locked_bytes for reply in replies),
            lock_s=max(reply.lock_s for reply in replies),
        )

    def open_rings(self, size_bytes: int, receivers: int, *, timeout_s: float) -> tuple[wire.RingOffer, ...]:
        """A ring of that size in each agent, in place of any before, for that many readers; offers by agent."""
        ask = wire.OpenRing(size_bytes=size_bytes, receivers=receivers)
        replies = self._conversation.ask(dict.fromkeys(self._peers, ask), wire.RingOpened, timeout_s=timeout_s)
        return tuple(replies[peer].offer for peer in self._peers)

    def tell_plan(self, plan: Plan | None) -> None:
        """Have all send by this plan, or by the one they had last; each answers PlanTaken."""
        for peer in self._peers:
            self._conversation.tell(peer, wire.TakePlan(plan=plan))

    def start_sending(self, *, timeout_s: float, trace: bool = False) -> None:
        """Let all send; each answers Sent when its last bucket was read."""
        for peer in self._peers:
            self._conversation.tell(peer, wire.Send(timeout_s=timeout_s, trace=trace))

    def close_rings(self, *, timeout_s: float) -> None:
        """Give ring memory back in every agent, also in the middle of a transfer."""
        asks: Mapping[bytes, wire.AnyMessage] = dict.fromkeys(self._peers, wire.Abort(cause="the update is over"))
        replies = self._conversation.ask(asks, wire.RingClosed, timeout_s=timeout_s, patient=True)
        self._stuck = self._stuck or len(replies) < len(self._peers)

    def stop(self) -> None:
        """End all processes: politely, then not."""
        for peer in self._peers:
            self._conversation.tell(peer, wire.Stop())
        self._conversation.dismiss(self._peers, self._token)
        for child in self._children:
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children:
            try:
                child.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        remove_directory(self._directory)  # rings of agents that could not remove them


def _spawn(config: AgentConfig) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-m", "ckpt_core.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=child_environment(visible_gpu=None if config.device == CPU else config.device),
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(config) + b"\n")
    child.stdin.flush()
    return child


def _shares(index: SourceIndex, count: int) -> list[tuple[str, ...]]:
    """Names dealt so that bytes are even: largest first, to the least loaded."""
    names: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for extent in sorted(index.extents, key=lambda extent: extent.size_bytes, reverse=True):
        agent = load.index(min(load))
        names[agent].append(extent.name)
        load[agent] += extent.size_bytes
    return [tuple(share) for share in names]
