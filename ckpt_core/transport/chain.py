"""Connections between agents of different hosts: buckets one after the other over TCP, never waiting, each with its digest.

Who sends what to whom in which order is known on both sides; a frame says its length, digest and number all the same. A
connection lives for one update: what an aborted one left on the way is gone with it. Bytes are not encrypted (nor are those
of NCCL or RDMA): a connection is taken only from who knows the update's secret, and a byte that changed is noticed.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from hmac import compare_digest

import xxhash

from ckpt_core.errors import PeerLost, RendezvousTimeout, TransportError
from ckpt_core.relay import Relay
from ckpt_core.wire import Links

_log = logging.getLogger(__name__)
_HELLO = struct.Struct("<32sI")  # secret, number of the agent
_HEAD = struct.Struct("<QQQ")  # bytes, xxh3-64 of them, number in the ring that they are for
_AT_ONCE = 4 << 20
_CONNECT_S = 20.0
_LOOK_EVERY_S = 0.1


class Outlet:
    """The way to one agent: one bucket at a time."""

    def __init__(self, connection: socket.socket, peer: int) -> None:
        self._at = _prepared(connection)
        self._connection = connection
        self._pending: deque[memoryview] = deque()
        self.peer = peer

    @property
    def idle(self) -> bool:
        """Whether all that it was given is on its way."""
        return not self._pending

    def fileno(self) -> int:
        """For select."""
        return self._connection.fileno()

    def start(self, payload: memoryview, digest: int, seq: int) -> None:
        """Begin to send bucket `seq` of the receiver's ring; the payload must stay as it is until the outlet is idle."""
        self._pending.append(memoryview(_HEAD.pack(len(payload), digest, seq)))
        if len(payload):
            self._pending.append(payload)

    def pump(self) -> bool:
        """Send what the socket takes. Whether it took anything."""
        moved = False
        while self._pending:
            try:
                sent = self._connection.send(self._pending[0][:_AT_ONCE])
            except BlockingIOError:
                return moved
            except OSError as error:
                raise _lost(self.peer, self._at, error) from error
            moved = True
            if sent == len(self._pending[0]):
                self._pending.popleft()
            else:
                self._pending[0] = self._pending[0][sent:]
        return moved

    def close(self) -> None:
        """Hang up."""
        self._pending.clear()
        self._connection.close()


class Inlet:
    """The way from one agent: filled into the places that it is given, in order."""

    def __init__(self, connection: socket.socket, peer: int) -> None:
        self._at = _prepared(connection)
        self._connection = connection
        self._head = bytearray()
        self._digest = 0
        self._seq = 0
        self._place: memoryview | None = None
        self._filled = 0
        self.peer = peer

    @property
    def busy(self) -> bool:
        """Whether it has a place to fill."""
        return self._place is not None

    def fileno(self) -> int:
        """For select."""
        return self._connection.fileno()

    def expect(self, place: memoryview, seq: int) -> None:
        """The next bucket goes here; it has exactly this size, and this number in the ring."""
        self._place, self._filled, self._seq = place, 0, seq
        self._head.clear()

    def pump(self) -> tuple[bool, int | None]:
        """Take what has come. Whether anything had, and the digest of the bucket once it is complete and right.

        Raises:
            PeerLost: the other end is gone.
            TransportError: another size than expected, or bytes that are not those that were sent.
        """
        moved = False
        if self._place is None:
            return False, None
        try:
            while len(self._head) < _HEAD.size:
                self._head += self._checked(self._connection.recv(_HEAD.size - len(self._head)))
                moved = True
            size, self._digest, seq = _HEAD.unpack(self._head)
            if (seq, size) != (self._seq, len(self._place)):
                raise TransportError(
                    f"agent {self.peer} sent bucket {seq} of {size} bytes, expected {self._seq} of {len(self._place)}; all hosts "
                    "must follow one plan: install the same ckpt-core on all"
                )
            while self._filled < size:
                got = self._connection.recv_into(self._place[self._filled :], min(size - self._filled, _AT_ONCE))
                if not got:
                    self._checked(b"")
                self._filled += got
                moved = True
        except BlockingIOError:
            return moved, None
        except OSError as error:
            raise _lost(self.peer, self._at, error) from error
        return True, self._finish()

    def _finish(self) -> int:
        assert self._place is not None
        place, self._place = self._place, None
        if (found := xxhash.xxh3_64_intdigest(place)) != self._digest:
            raise TransportError(
                f"a bucket from agent {self.peer} arrived with digest {found:016x}, sent was {self._digest:016x}: bytes changed on "
                "the way; update again, and look at the hosts' memory and network if it comes back"
            )
        return self._digest

    def _checked(self, data: bytes) -> bytes:
        if not data:
            raise _lost(self.peer, self._at, None)
        return data

    def close(self) -> None:
        """Hang up."""
        self._place = None
        self._connection.close()


class _Port:
    """Where agents of other hosts connect to, for one update.

    Args:
        address: of this host, as the others reach it.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, 0), family=family, backlog=256)
        self._listening.setblocking(False)
        self.address = address
        self.port: int = self._listening.getsockname()[1]

    def accept(self, secret: bytes, expected: Sequence[int], deadline: float, check: Callable[[], None]) -> list[Inlet]:
        """Connections of these agents, in that order. Who says nothing, or something else, keeps nobody waiting.

        Raises:
            RendezvousTimeout: not all came before `deadline`, by `time.monotonic()`.
        """
        found: dict[int, Inlet] = {}
        strangers: dict[socket.socket, bytes] = {}
        try:
            while missing := [peer for peer in expected if peer not in found]:
                check()
                if time.monotonic() > deadline:
                    raise RendezvousTimeout(
                        f"agents {missing} did not connect to {self.address}; do they reach it, and does a firewall let them?"
                    )
                ready, _, _ = select.select([self._listening, *strangers], [], [], _LOOK_EVERY_S)
                for end in ready:
                    if end is self._listening:
                        self._take(strangers)
                    elif (peer := _greeted(end, strangers, secret)) is not None:
                        if peer in missing and peer not in found:
                            found[peer] = Inlet(end, peer)
                        else:
                            end.close()
        except BaseException:
            for inlet in found.values():
                inlet.close()
            raise
        finally:
            for stranger in strangers:
                stranger.close()
        return [found[peer] for peer in expected]

    def _take(self, strangers: dict[socket.socket, bytes]) -> None:
        with contextlib.suppress(OSError):  # it may have hung up before it was taken
            connection, _ = self._listening.accept()
            connection.setblocking(False)
            strangers[connection] = b""

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self._listening.close()


class Neighbours:
    """An agent's connections with agents of other hosts, in one update.

    Args:
        address: of this host, as the others reach it.

    Attributes:
        port: where they connect to, host:port.
    """

    def __init__(self, address: str) -> None:
        self._port = _Port(address)
        self.port = f"{address}:{self._port.port}"
        self._links: Links | None = None
        self._inlets: list[Inlet] = []
        self._outlets: list[Outlet] = []

    def connect(self, relay: Relay, links: Links) -> None:
        """Connect to those that this agent sends to.

        Raises:
            PeerLost: one does not answer.
        """
        deadline = time.monotonic() + _CONNECT_S
        self._hang_up()
        self._links = links
        for peer, address in zip(relay.outlets, links.ports, strict=True):
            self._outlets.append(connect(address, peer=peer, links=links, deadline=deadline))

    def meet(self, relay: Relay, check: Callable[[], None]) -> tuple[list[Inlet], list[Outlet]]:
        """Inlets and outlets of the relay, in its order.

        Args:
            check: called now and then; raises to end the wait.

        Raises:
            RendezvousTimeout: an agent that should send did not connect.
        """
        assert self._links is not None, "connect comes first"
        secret = self._links.secret.encode()
        self._inlets = self._port.accept(secret, relay.inlets, time.monotonic() + _CONNECT_S, check)
        return self._inlets, self._outlets

    def close(self) -> None:
        """Hang up, and listen no more. Idempotent."""
        self._hang_up()
        self._port.close()

    def _hang_up(self) -> None:
        for inlet in self._inlets:
            inlet.close()
        for outlet in self._outlets:
            outlet.close()
        self._inlets, self._outlets = [], []


def connect(address: str, *, peer: int, links: Links, deadline: float) -> Outlet:
    """Connect to an agent's port.

    Args:
        address: host:port.
        peer: number of that agent.

    Raises:
        PeerLost: nobody answers there.
    """
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 1e-3))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_HELLO.pack(links.secret.encode(), links.agent))
    except OSError as error:
        raise PeerLost(
            f"agent {peer} does not answer at {address} ({error}); is its host up, and does a firewall let this one through?"
        ) from error
    return Outlet(connection, peer)


def _greeted(end: socket.socket, strangers: dict[socket.socket, bytes], secret: bytes) -> int | None:
    """Number of who has said all and knows the secret, -1 of who does not; None while there is more to come."""
    try:
        more = end.recv(_HELLO.size - len(strangers[end]))
    except BlockingIOError:
        return None
    except OSError:
        more = b""
    said = strangers[end] = strangers[end] + more
    if more and len(said) < _HELLO.size:
        return None
    del strangers[end]
    if len(said) == _HELLO.size:
        claimed, peer = _HELLO.unpack(said)
        if compare_digest(claimed, secret):
            return int(peer)
    _log.warning("turned away a connection that did not know this update's secret")
    return -1


def _prepared(connection: socket.socket) -> str:
    """Make it never block, and notice a host that vanished; where it goes. (TCP_USER_TIMEOUT would also end a connection to
    a host that lives and is slow.)"""
    connection.setblocking(False)
    if connection.family == socket.AF_UNIX:
        return "this host"
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    with contextlib.suppress(OSError):  # it may have ended already
        return str(connection.getpeername()[0])
    return "an unknown host"


def _lost(peer: int, at: str, error: OSError | None) -> PeerLost:
    why = f" ({error.strerror})" if error is not None else ""
    return PeerLost(
        f"the connection to agent {peer} broke{why}: it died, or its host {at} did; look into its log, then update again"
    )
