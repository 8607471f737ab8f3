"""One TCP connection between every two hosts of a lane: how far each host is, and whether it lives.

It does two things that a collective cannot do. It says how far each host is, so that a broadcast starts when all hosts can do
their part: a kernel that spins for a slow peer takes the accelerator from the ranks, which are other processes and
share it by time slices. And it ends with its process, so that a death is seen at once, also where the backend would wait
for ever (NCCL over NVLink).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_core.errors import ConfigError, PeerLost, RendezvousTimeout, TransportError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_log = logging.getLogger(__name__)

# round, batches that the host is ready for, digest of the round's schedule
_NOTE = struct.Struct("<QQQ")
_GOODBYE = (1 << 64) - 1
_HELLO = struct.Struct("<16sI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Which place in which lane.

    Attributes:
        lane: name of the group, used once: a lane that is joined again after a failure gets a new one.
        host: this host's number in the lane, from 0.
        hosts: how many.
        address: where the other hosts reach this one; also what gloo binds to.
    """

    lane: str
    host: int
    hosts: int
    address: str

    def __post_init__(self) -> None:
        if not 0 <= self.host < self.hosts:
            raise ConfigError(f"lane {self.lane}: expected a host from 0 to {self.hosts - 1}, got {self.host}")


class _Peer:
    """One other host: its connection, and what it said last."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.round = self.ready = self.digest = 0
        self.left = False
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def send(self, note: bytes) -> None:
        """Send, or keep what the socket does not take now."""
        self._outgoing += note
        with contextlib.suppress(BlockingIOError):
            del self._outgoing[: self.connection.send(self._outgoing)]

    def receive(self) -> bool:
        """Take in what came; False where the connection ended without a goodbye."""
        if self._outgoing:
            self.send(b"")
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        self._incoming += data
        whole = len(self._incoming) // _NOTE.size * _NOTE.size
        for note in _NOTE.iter_unpack(self._incoming[:whole]):
            if note[0] == _GOODBYE:
                self.left = True
            else:
                self.round, self.ready, self.digest = note
        del self._incoming[:whole]
        return bool(data) or self.left


class Peers:
    """The other hosts of a lane. Nothing here blocks, after the connections are made."""

    def __init__(self, lane: str, peers: dict[int, _Peer]) -> None:
        self._lane = lane
        self._peers = peers

    @classmethod
    def connect(cls, store: Store, me: Membership, deadline: float) -> Peers:
        """Connect to every other host, by addresses in the store: each listens, and calls those with a lower number.

        Raises:
            RendezvousTimeout: not all came before `deadline`, by `time.monotonic()`.
        """
        family = socket.AF_INET6 if ":" in me.address else socket.AF_INET
        connections: dict[int, socket.socket] = {}
        with socket.create_server((me.address, 0), family=family, backlog=me.hosts) as listening:
            if me.host == 0:
                store.set("secret", secrets.token_hex(16))
            store.set(f"peer/{me.host}", f"{listening.getsockname()[1]} {me.address}")
            try:
                secret = bytes.fromhex(store.get("secret").decode())
                for host in range(me.host):
                    port, _, address = store.get(f"peer/{host}").decode().partition(" ")
                    connections[host] = socket.create_connection((address, int(port)), timeout=_left_s(deadline))
                    connections[host].sendall(_HELLO.pack(secret, me.host))
                while len(connections) < me.hosts - 1:
                    host, connection = _accept(listening, secret, deadline)
                    connections[host] = connection
            except (OSError, RuntimeError) as error:
                for connection in connections.values():
                    connection.close()
                raise RendezvousTimeout(
                    f"lane {me.lane}: host {me.host} found {len(connections)} of {me.hosts - 1} other hosts ({error}); check that "
                    f"their agents run and reach {me.address}"
                ) from error
        return cls(me.lane, {host: _Peer(connection) for host, connection in sorted(connections.items())})

    def tell(self, round_number: int, ready: int, digest: int) -> None:
        """Say to all how far this host is."""
        note = _NOTE.pack(round_number, ready, digest)
        for host, peer in self._peers.items():
            try:
                peer.send(note)
            except OSError as error:
                if not peer.left:
                    raise self._lost(host) from error

    def listen(self) -> None:
        """Take in what the others said.

        Raises:
            PeerLost: one of them went away without a goodbye.
        """
        for host, peer in self._peers.items():
            if peer.left:
                continue
            try:
                alive = peer.receive()
            except OSError as error:
                raise self._lost(host) from error
            if not alive:
                raise self._lost(host)

    def agreed(self, round_number: int, digest: int, most: int) -> int:
        """The number of batches of that round that all others are ready for, at most `most`.

        Raises:
            TransportError: one of them follows another schedule.
            PeerLost: one of them left before it was through.
        """
        for host, peer in self._peers.items():
            if peer.round > round_number:
                continue  # it is through with this round
            if peer.round == round_number and peer.digest != digest:
                raise TransportError(
                    f"lane {self._lane}: host {host} follows another schedule (expected {digest:x}, got {peer.digest:x}); give "
                    "all hosts one plan, the same sources and the same batch size"
                )
            ready = peer.ready if peer.round == round_number else 0
            if peer.left and ready < most:
                raise self._lost(host)
            most = min(most, ready)
        return most

    def behind(self, round_number: int, ready: int) -> list[int]:
        """Hosts that are not ready for that many batches."""
        return [host for host, peer in self._peers.items() if (peer.round, peer.ready) < (round_number, ready)]

    def close(self, *, goodbye: bool) -> None:
        """Disconnect; without a goodbye the others take it for a death. Idempotent."""
        for peer in self._peers.values():
            if goodbye:
                with contextlib.suppress(OSError):
                    peer.send(_NOTE.pack(_GOODBYE, 0, 0))
            peer.connection.close()
        self._peers = {}

    def _lost(self, host: int) -> PeerLost:
        return PeerLost(
            f"lane {self._lane}: the agent of host {host} is gone; see its log, start it again, and join the lane anew"
        )


def _accept(listening: socket.socket, secret: bytes, deadline: float) -> tuple[int, socket.socket]:
    """The next host that knows the secret; others are turned away."""
    while True:
        listening.settimeout(_left_s(deadline))
        connection, _ = listening.accept()
        try:
            connection.settimeout(_left_s(deadline))
            said = connection.recv(_HELLO.size, socket.MSG_WAITALL)
            if len(said) == _HELLO.size and secrets.compare_digest(said[:16], secret):
                return int(_HELLO.unpack(said)[1]), connection
        except OSError:
            _log.warning("a connection to the lane ended before it said who it is")
        connection.close()


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 1e-3)
