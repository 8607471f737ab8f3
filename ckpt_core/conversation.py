"""The controller's side of the talk: ask a set of peers, get one reply from each, while all hear that it is alive.

Whatever ends an update early surfaces here, at the next message or within milliseconds: a peer's Failure, a process
that died, a deadline, or a watch of the session's own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from ckpt_core import errors, process, wire
from ckpt_core.channel import Hub
from ckpt_core.errors import CkptError, HookFailed, PeerLost, RendezvousTimeout, TransferTimeout, TransportError

M = TypeVar("M", bound=wire.Message)
_ROUND_S = 0.02


class Conversation:
    """All peers of one controller.

    Args:
        hub: its socket.
        ping_every_s: how often everybody hears of it.

    Attributes:
        on_progress: called with a peer's name and its Progress.
        watches: called every round; raise to end what is going on.
        agents: who dialled in as an agent, whether or not anybody waited for it.
    """

    def __init__(self, hub: Hub, *, ping_every_s: float) -> None:
        self._hub = hub
        self._ping_every_s = ping_every_s
        self._pinged = 0.0
        self._deaths = process.DeathWatch(process.current())
        self._names: dict[bytes, str] = {}
        self._inbox: deque[tuple[bytes, wire.AnyMessage]] = deque()
        self.on_progress: Callable[[str, wire.Progress], None] = lambda _name, _progress: None
        self.watches: list[Callable[[], None]] = []
        self.agents: dict[bytes, wire.AgentHello] = {}
        self._agent_tokens: set[str] = set()
        self._farewell: wire.AnyMessage | None = None

    @property
    def address(self) -> str:
        """Where peers dial in."""
        return self._hub.address

    @property
    def server_key(self) -> str:
        """What peers on other hosts need for it; "" where there are none."""
        return self._hub.server_key

    def admit(
        self, hello: type[M], count: int, *, timeout_s: float, who: str, into: dict[bytes, M] | None = None
    ) -> dict[bytes, M]:
        """Wait for the first words of that many new peers; `into` is filled as they come, also where this raises.

        Raises:
            RendezvousTimeout: not all came.
        """
        came: dict[bytes, M] = {} if into is None else into
        deadline = time.monotonic() + timeout_s
        while len(came) < count:
            if time.monotonic() > deadline:
                raise RendezvousTimeout(
                    f"{len(came)} of {count} {who}s dialled in within {timeout_s:g} s; look into the logs of the others"
                )
            for peer, message in self._round():
                if isinstance(message, hello):
                    came[peer] = message
                    self._names[peer] = who
        return came

    def introduce(self, peer: bytes, info: wire.ProcessInfo, name: str) -> None:
        """Name a peer and watch its process, where that is on this host."""
        self._names[peer] = name
        self._deaths.add(info, name)

    def tell(self, peer: bytes, message: wire.AnyMessage) -> None:
        """Send without waiting."""
        self._hub.send(peer, message)

    def ask(
        self, asks: Mapping[bytes, wire.AnyMessage], reply: type[M], *, timeout_s: float, patient: bool = False
    ) -> dict[bytes, M]:
        """Send to each peer and wait for one reply of that kind from each; see `gather`."""
        for peer, message in asks.items():
            self.tell(peer, message)
        return self.gather(dict.fromkeys(asks, reply), timeout_s=timeout_s, patient=patient)

    def gather(
        self,
        wanted: Mapping[bytes, type[M] | tuple[type[M], ...]],
        *,
        timeout_s: float,
        patient: bool = False,
        into: dict[bytes, M] | None = None,
        only_theirs: bool = False,
    ) -> dict[bytes, M]:
        """Wait for one message of the wanted kind from each of those peers.

        Args:
            wanted: kind, or kinds, by peer.
            timeout_s: for all together.
            patient: after a failure: let failures, deaths and the deadline pass, and return who answered.
            into: filled as answers come, so that they are known also where this raises.
            only_theirs: failures and deaths of others are let pass.

        Raises:
            CkptError: what a peer reported, in its own class where it is one of ours, else HookFailed.
            PeerLost: a process died.
            TransferTimeout: the deadline.
        """
        got: dict[bytes, M] = {} if into is None else into
        deadline = time.monotonic() + timeout_s
        while len(got) < len(wanted):
            if time.monotonic() > deadline:
                if patient:
                    return got
                raise TransferTimeout(self._who_is_late(wanted, got, timeout_s))
            for peer, message in self._round(minded=() if patient else tuple(wanted) if only_theirs else None):
                if isinstance(message, wire.RankHello) and not patient:
                    raise TransportError(
                        f"rank {message.rank.rank} of {message.rank.world_size} dialled in after all that were expected; the "
                        "engine's status and its ranks disagree about its size"
                    )
                if peer in wanted and isinstance(message, wanted[peer]):
                    got[peer] = message
            if patient and self._all_others_dead(wanted, got):
                return got
        return got

    def forget(self, peers: Iterable[bytes]) -> None:
        """Stop pinging those peers and watching their processes; what they said and nobody heard is void."""
        gone = set(peers)
        for peer in gone:
            self._deaths.drop(self._names.pop(peer, ""))
            self.agents.pop(peer, None)
        self._inbox = deque(item for item in self._inbox if item[0] not in gone)

    def listen_to(self, token: str, *, agents: bool = False) -> None:
        """Admit peers that carry this token from now on; with `agents`, also as agents."""
        self._hub.allow(token)
        if agents:
            self._agent_tokens.add(token)

    def dismiss(self, peers: Iterable[bytes], token: str = "") -> None:
        """Forget those peers, and listen to nobody with their token any more, if it is given."""
        gone = tuple(peers)
        self.forget(gone)
        self._hub.forget(gone)
        self._hub.revoke(token)
        self._farewell = None

    def turn_away(self, answer: wire.AnyMessage) -> None:
        """From now on answer ranks that dial in by this, until they are dismissed: the update is over before they came."""
        self._farewell = answer

    def idle_until(self, done: Callable[[], bool], *, timeout_s: float) -> None:
        """Listen, and let all that is said pass, until something else is done or the deadline is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            for _ in self._round(minded=()):
                pass
            if done() or time.monotonic() >= deadline:
                return

    def close(self) -> None:
        """Stop watching processes."""
        self._deaths.close()

    def _round(self, *, minded: Collection[bytes] | None = None) -> Iterator[tuple[bytes, wire.AnyMessage]]:
        """Ping if it is time, yield what came, raise failures and deaths of the minded (None: of everybody).

        What is not yielded because of a raise stays in the inbox: a failed rank's next message says how it ended.
        """
        self._ping()
        self._inbox.extend(self._hub.receive(0.0 if self._inbox else _ROUND_S))
        while self._inbox:
            peer, message = self._inbox[0]
            if isinstance(message, wire.RankHello) and self._farewell is not None:
                self._hub.send(peer, self._farewell)  # and only then forgotten: an interrupt must not leave it waiting
                self._inbox.popleft()
                continue
            self._inbox.popleft()
            if isinstance(message, wire.Progress):
                self.on_progress(self._names.get(peer, "?"), message)
            elif isinstance(message, wire.Failure) and (minded is None or peer in minded):
                raise failure_of(self._names.get(peer, "an unknown peer"), message)
            else:
                if isinstance(message, wire.AgentHello) and self._hub.token_of(peer) in self._agent_tokens:
                    self.agents[peer] = message
                yield peer, message
        self._check_alive(minded)

    def _check_alive(self, minded: Collection[bytes] | None) -> None:
        names = None if minded is None else {self._names.get(peer) for peer in minded}
        if dead := [name for name in self._deaths.dead() if names is None or name in names]:
            raise PeerLost(f"{', '.join(dead)} died during the update; look into its log, then update again")
        if minded is None:
            for watch in self.watches:
                try:
                    watch()
                except CkptError:
                    self._raise_failure_that_came()
                    raise

    def _raise_failure_that_came(self) -> None:
        """Whoever left may have said why, since messages were last looked at."""
        self._inbox.extend(self._hub.receive(0.0))
        for item in self._inbox:
            peer, message = item
            if isinstance(message, wire.Failure):
                self._inbox.remove(item)
                raise failure_of(self._names.get(peer, "an unknown peer"), message)

    def _ping(self) -> None:
        now = time.monotonic()
        if now - self._pinged < self._ping_every_s:
            return
        self._pinged = now
        for peer in self._names:
            self._hub.send(peer, wire.Ping())

    def _all_others_dead(self, wanted: Iterable[bytes], got: Mapping[bytes, M]) -> bool:
        dead = set(self._deaths.dead())
        return all(self._names.get(peer) in dead for peer in wanted if peer not in got)

    def _who_is_late(
        self, wanted: Mapping[bytes, type[M] | tuple[type[M], ...]], got: Mapping[bytes, M], timeout_s: float
    ) -> str:
        late = [
            f"{self._names.get(peer, '?')} ({' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))})"
            for peer, kind in wanted.items()
            if peer not in got
        ]
        return f"no answer within {timeout_s:g} s from {', '.join(late)}; is it stopped or overloaded?"


def failure_of(name: str, failure: wire.Failure) -> CkptError:
    """The error that a peer reported, in its own class where that takes a message only."""
    kind = getattr(errors, failure.error, None)
    text = f"{name}, in {failure.phase}: {failure.message}"
    plain = isinstance(kind, type) and issubclass(kind, CkptError) and kind not in (errors.UpdateAborted, HookFailed)
    if plain and issubclass(kind, CkptError):  # type: ignore[arg-type]
        made: CkptError = kind(text)  # type: ignore[misc]
        return made
    return HookFailed(
        f"{name}, in {failure.phase}: {failure.error}: {failure.message}", remote_traceback=failure.traceback
    )
