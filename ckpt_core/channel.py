"""Sockets of the control plane: the controller's hub, and the one end that each agent and rank has.

ZeroMQ over a unix socket in a 0700 directory, or over TCP with CURVE between hosts. A peer is known by its ZeroMQ identity,
which it draws itself; nothing it says counts, or is decoded, before its first frame carried the update's token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from ckpt_core import wire
from ckpt_core.cluster import ClusterKey
from ckpt_core.errors import ConfigError, PeerLost, RendezvousTimeout, TransportError, WireError

_log = logging.getLogger(__name__)
_LINGER_MS = 2000
_HEARTBEAT_MS = 2000
_HEARTBEAT_TIMEOUT_MS = 10_000
_RECONNECT_MOST_MS = 1000
_HANDSHAKE_MS = 5000  # a stranger who does not finish it is hung up on
M = TypeVar("M", bound=wire.Message)


class Hub:
    """The controller's sockets.

    Args:
        directory: a 0700 directory for the unix socket.
        cluster: listen at its address instead.

    Attributes:
        address: where peers dial in.
        server_key: what they need for it; "" on one host.

    Raises:
        ConfigError: the cluster's address cannot be listened on.
    """

    def __init__(self, directory: Path | None = None, *, cluster: ClusterKey | None = None) -> None:
        self.address = f"ipc://{directory}/control" if cluster is None else cluster.address
        self.server_key = "" if cluster is None else cluster.server_key
        self._tokens: set[str] = set()
        self._token_of: dict[bytes, str] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REPLY_BYTES)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        if cluster is not None:
            _serve_curve(self._socket, cluster)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {self.address}: {error}; is another controller of this cluster running?"
            ) from error
        self._received: dict[bytes, int] = {}
        self._sent: dict[bytes, int] = {}

    def allow(self, token: str) -> None:
        """Listen to peers that carry this token."""
        self._tokens.add(token)

    def revoke(self, token: str) -> None:
        """Forget the token and all peers that came with it."""
        self._tokens.discard(token)
        self.forget([peer for peer, known in self._token_of.items() if known == token])

    def forget(self, peers: Iterable[bytes]) -> None:
        """These are gone, or are to be: nothing is sent to them any more."""
        for peer in peers:
            if self._token_of.pop(peer, None) is not None:
                del self._received[peer]
            self._sent.pop(peer, None)

    def token_of(self, peer: bytes) -> str:
        """That a peer came with; "" for one that is not known."""
        return self._token_of.get(peer, "")

    def send(self, peer: bytes, body: wire.AnyMessage) -> None:
        """Queue a message for a peer; one that is not known (any more) gets nothing."""
        if peer not in self._token_of:
            return
        self._sent[peer] = self._sent.get(peer, 0) + 1
        frame = wire.encode(body, token=self._token_of[peer], seq=self._sent[peer])
        self._socket.send_multipart([peer, frame])

    def receive(self, timeout_s: float) -> Iterator[tuple[bytes, wire.AnyMessage]]:
        """Messages that are there, waiting for the first at most so long. Frames that do not fit are dropped and logged."""
        wait_ms = max(0, int(timeout_s * 1000))
        while self._socket.poll(wait_ms):
            wait_ms = 0
            frames = self._socket.recv_multipart()
            try:
                yield frames[0], self._check(frames)
            except WireError as error:
                _log.warning("dropped a frame: %s", error)

    def _check(self, frames: list[bytes]) -> wire.AnyMessage:
        if len(frames) != 2:
            raise WireError(f"expected an identity and one frame, got {len(frames)} parts")
        peer, frame = frames
        tokens = [self._token_of[peer]] if peer in self._token_of else self._tokens
        envelope = wire.decode(frame, tokens=tokens, last_seq=self._received.get(peer, 0))
        self._token_of[peer] = envelope.token
        self._received[peer] = envelope.seq
        return envelope.body

    def close(self) -> None:
        """Send what is queued, then close."""
        self._socket.close()
        self._context.term()


class Line:
    """A peer's end: one controller, frames in order.

    Args:
        address: the hub's.
        token: the update's.
        silence_timeout_s: `receive` raises when nothing came for this long.
        server_key: the controller's, between hosts.
        watch: notice when a controller that was there is gone.
    """

    def __init__(
        self, address: str, token: str, silence_timeout_s: float, *, server_key: str = "", watch: bool = False
    ) -> None:
        self._token = token
        self._silence_timeout_s = silence_timeout_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        if server_key:
            _dial_curve(self._socket, server_key)
        self._events = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if watch else None
        self._socket.connect(address)
        self._received = 0
        self._sent = 0
        self._heard = time.monotonic()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close()  # else the context waits for it for ever
        self._socket.close()
        self._context.term()

    def send(self, body: wire.AnyMessage) -> None:
        """Queue a message; it is sent in the background, also during close."""
        self._sent += 1
        self._socket.send(wire.encode(body, token=self._token, seq=self._sent))

    def poll(self, timeout_s: float = 0.0) -> wire.AnyMessage | None:
        """The next message that is not a Ping, or None if none came in time.

        Raises:
            RendezvousTimeout: the controller has been silent for too long.
            ControllerLost: it is watched, and gone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._events is not None and self._events.poll(0):
                raise ControllerLost(
                    "the connection to the controller ended: it is gone, or this is another cluster's key"
                )
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            if self._socket.poll(left_ms):
                if not isinstance(message := self._take(), wire.Ping):
                    return message
            elif time.monotonic() - self._heard > self._silence_timeout_s:
                raise RendezvousTimeout(f"no word from the controller for {self._silence_timeout_s:g} s; is it alive?")
            elif time.monotonic() >= deadline:
                return None

    def expect(self, *kinds: type[M]) -> M:
        """Wait for a message of one of those kinds, as long as the controller keeps talking.

        Raises:
            AbortRequested: the controller asked to abort instead.
            TransportError: another message came.
            RendezvousTimeout: the controller fell silent.
        """
        while (message := self.poll(1.0)) is None:
            pass
        if isinstance(message, wire.Abort):
            raise AbortRequested(message.cause)
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise TransportError(f"expected {expected} from the controller, got {type(message).__name__}")
        return message

    def check_abort(self) -> None:
        """Raise AbortRequested if the controller asked for it; costs a microsecond where it did not."""
        message = self.poll()
        if isinstance(message, wire.Abort):
            raise AbortRequested(message.cause)
        if isinstance(message, wire.Stop):
            raise StopRequested("the controller ended this process")
        if message is not None:
            raise TransportError(f"unexpected {type(message).__name__} from the controller during a transfer")

    def _take(self) -> wire.AnyMessage:
        envelope = wire.decode(self._socket.recv(), tokens=[self._token], last_seq=self._received)
        self._received = envelope.seq
        self._heard = time.monotonic()
        return envelope.body


class AbortRequested(TransportError):
    """The controller ended the update; the text is its cause."""


class StopRequested(TransportError):
    """The controller has no use for this process any more."""


class ControllerLost(PeerLost):
    """It is gone, and with it the reason for this process."""


def _serve_curve(socket: zmq.Socket[bytes], cluster: ClusterKey) -> None:
    """Who does not know the public key gets nowhere; who does must still show a token."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = cluster.server_key.encode(), cluster.secret_key.encode()
    _beat(socket)


def _dial_curve(socket: zmq.Socket[bytes], server_key: str) -> None:
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MOST_MS)
    _beat(socket)


def _beat(socket: zmq.Socket[bytes]) -> None:
    """A host that vanished does not hang up: its connections end when it is silent."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
