"""The agent process: owns the host pool of one checkpoint and one ring, and does what the controller says.

Started as `python -m ckpt_core.agent` with one line of JSON on standard input (so that the token is in no process list).
It ends when told to, when standard input closes (its parent is gone), or when the controller falls silent. Imports no torch.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ckpt_core import numa, process, wire
from ckpt_core.channel import AbortRequested, ControllerLost, Line, StopRequested
from ckpt_core.cuda import driver, probe
from ckpt_core.device import CPU
from ckpt_core.devices import device_of
from ckpt_core.errors import CkptError, PeerLost, PlanError, TransferTimeout, TransportError
from ckpt_core.failure import failure_message
from ckpt_core.manifest import Manifest
from ckpt_core.p2p.remote_source import RemoteSource
from ckpt_core.pipeline import Outgoing, send
from ckpt_core.plan import Plan
from ckpt_core.polling import Poller
from ckpt_core.pool_digests import PoolDigests
from ckpt_core.relay import Relay
from ckpt_core.relaying import Slots, relay_all, slots_for
from ckpt_core.shm import remove_directory
from ckpt_core.source_share import as_here, only
from ckpt_core.staging import HostPool
from ckpt_core.trace import TrackKind
from ckpt_core.tracks import ProcessTracks
from ckpt_core.transport.chain import Neighbours
from ckpt_core.transport.ipc import IpcRingWriter
from ckpt_core.uncollected import uncollected

_log = logging.getLogger(__name__)
_IDLE_POLL_S = 0.2
_ORPHANED_WITHIN_S = 1.0
_ABORT_WITHIN_S = 0.1


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is started with.

    Attributes:
        address, token: of the controller's hub.
        index, count: which agent of the group this is, and of how many.
        directory: 0700 directory for its shared memory.
        device: where its ring lives.
        parent: process id of the controller.
        orphans: directories that the agent removes when its controller is gone without having done so.
        silence_timeout_s: it ends when it hears nothing for that long.
        server_key: of the controller, where that may be on another host.
        reached_at: where agents of other hosts reach this one; "" on one host.
        nic_gb_s: what the host's network carries, GB/s; 0 where nobody said.
    """

    address: str
    token: str
    index: int
    count: int
    directory: str
    device: str = "cpu"
    parent: int = 0
    orphans: tuple[str, ...] = ()
    silence_timeout_s: float = 20.0
    log_level: str = "WARNING"
    server_key: str = ""
    reached_at: str = ""
    nic_gb_s: float = 0.0


class Agent:
    """The state of one agent between messages."""

    def __init__(self, config: AgentConfig, line: Line) -> None:
        self._config = config
        self._line = line
        self._device = device_of(config.device)
        self._pool = HostPool(self._device, turn=config.index / config.count)
        self._writer: IpcRingWriter | None = None
        self._outgrown: list[IpcRingWriter] = []  # which ranks may have mapped
        self._ring_number = 0
        self._receivers = 0
        self._outgoing: Outgoing | None = None
        self._plan: Plan | None = None
        self._manifest: Manifest | None = None
        self._relay: Relay | None = None
        self._neighbours: Neighbours | None = None
        self._slots: Slots | None = None
        self._remote: RemoteSource | None = None  # where the bytes are in memory of other hosts
        self._handlers: dict[type[wire.Message], Callable[..., wire.AnyMessage | None]] = {
            wire.Prepare: self._prepare,
            wire.OpenRing: self._open_ring,
            wire.TakePlan: self._take_plan,
            wire.Send: self._send,
            wire.Abort: self._close_ring,
        }

    def run(self) -> None:
        """Serve until told to stop."""
        config = self._config
        self._line.send(
            wire.AgentHello(
                agent=config.index,
                process=process.current(),
                count=config.count,
                address=config.reached_at,
                nic_gb_s=config.nic_gb_s,
            )
        )
        try:
            while not isinstance(message := self._next(), wire.Stop):
                self._handle(message)
        except StopRequested:
            pass  # it came in the middle of something
        finally:
            self._close_ring(None)
            self._let_go_of_remote()
            self._pool.close()

    def _next(self) -> wire.AnyMessage:
        while (message := self._line.poll(_IDLE_POLL_S)) is None:
            _check_parent()
        return message

    def _handle(self, message: wire.AnyMessage) -> None:
        try:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise TransportError(f"an agent has no use for a {type(message).__name__}")
            with uncollected():
                reply = handler(message)
        except AbortRequested:
            reply = self._close_ring(None)
        except (ControllerLost, StopRequested):
            raise
        except PeerLost as error:
            reply = self._lost(error, message)
        except Exception as error:  # noqa: BLE001 every failure goes to the controller
            reply = failure_message(error, type(message).__name__)
        if reply is not None:
            self._line.send(reply)

    def _lost(self, error: PeerLost, message: wire.AnyMessage) -> wire.AnyMessage:
        """A neighbour is gone; or it heard of the end of the update before this one did."""
        soon = self._line.poll(_ABORT_WITHIN_S)
        if isinstance(soon, wire.Stop):
            raise StopRequested("the controller ended this process")
        if isinstance(soon, wire.Abort):
            return self._close_ring(None)
        return failure_message(error, type(message).__name__)

    def _prepare(self, message: wire.Prepare) -> wire.Prepared:
        before, known, self._manifest = self._pool.layout, self._manifest, None  # none is known if this fails
        index = message.index
        if message.holds is not None:
            index = as_here(only(index, frozenset(message.holds)))
        self._let_go_of_remote()
        if index.remote is not None:
            self._remote = RemoteSource(index, self._device, agent=self._config.index, agents=self._config.count)
        locked_bytes, lock_s = self._pool.adopt(index)
        same = known is not None and self._pool.layout is before and message.holds is None
        self._manifest = manifest = known if known is not None and same else Manifest.from_index(message.index)
        start = time.perf_counter()
        digests = PoolDigests(self._pool, share=self._config.count, told=self._progress)
        parts = digests.of_parts(manifest, message.parts)
        sizes = [manifest.sizes_bytes[manifest.index_of(name)] for name in message.digest]
        return wire.Prepared(
            parts=parts,
            digests=digests.of_tensors(message.digest, sizes),
            digest_s=time.perf_counter() - start,
            locked_bytes=locked_bytes,
            lock_s=lock_s,
        )

    def _progress(self, done_bytes: int) -> None:
        self._line.send(wire.Progress(done_bytes=done_bytes))
        self._check()

    def _open_ring(self, message: wire.OpenRing) -> wire.RingOpened:
        if self._writer is not None:
            self._outgrown.append(self._writer)
            self._writer = None
        self._ring_number += 1
        self._writer = IpcRingWriter(
            owner=self._config.index,
            number=self._ring_number,
            receivers=message.receivers,
            ring_bytes=message.size_bytes,
            device=self._device,
            directory=Path(self._config.directory),
        )
        self._receivers = message.receivers
        if self._config.reached_at and self._neighbours is None:
            self._neighbours = Neighbours(self._config.reached_at)
        port = "" if self._neighbours is None else self._neighbours.port
        return wire.RingOpened(offer=self._writer.offer(), port=port)

    def _take_plan(self, message: wire.TakePlan) -> wire.PlanTaken:
        self._plan = message.plan or self._plan
        if self._plan is None or self._manifest is None:
            raise TransportError("asked to take the plan of last time, and knows none")
        if self._plan.structure_digest != self._manifest.structure_digest:
            raise PlanError(
                f"the plan is for checkpoints of structure {self._plan.structure_digest}, the prepared one has "
                f"{self._manifest.structure_digest}; prepare the checkpoint that the plan was made for"
            )
        self._check_ring(self._plan)
        if message.plan is not None:
            self._relay = message.relay
        arriving = frozenset(arrival.seq for arrival in self._relay.arrivals) if self._relay else frozenset[int]()
        if self._outgoing is None or not self._outgoing.holds(self._plan):
            self._outgoing = Outgoing(
                self._plan,
                self._config.index,
                self._pool,
                self._manifest,
                is_source=lambda step: step.seq not in arriving,
            )
        if self._relay is not None and message.links is not None and self._neighbours is not None:
            self._let_go_of_slots()
            self._slots = slots_for(self._outgoing, self._relay, self._device)
            self._neighbours.connect(self._relay, message.links)
        return wire.PlanTaken(digest=self._plan.digest)

    def _check_ring(self, plan: Plan) -> None:
        """No copy may end outside of the ring, and no reader be left out of its numbers."""
        if self._writer is None:
            raise TransportError("asked to take a plan before a ring was opened")
        got = (self._writer.offer().size_bytes, self._receivers, self._config.count)
        self._writer.expect(plan.receivers)
        if got[0] < plan.ring_bytes or got[1] < plan.receivers or got[2] != plan.agents:
            raise PlanError(
                f"ring bytes, readers, agents: the plan needs {plan.ring_bytes}, {plan.receivers}, {plan.agents}; "
                f"agent {self._config.index} has {', '.join(map(str, got))}; open the ring for this plan"
            )

    def _send(self, message: wire.Send) -> wire.Sent:
        writer = self._writer
        if writer is None or self._outgoing is None:
            raise TransportError("asked to send before a ring was opened and a plan taken")
        poller = Poller(
            check=self._check,
            deadline=time.monotonic() + message.timeout_s,
            expired=lambda what: TransferTimeout(
                f"agent {self._config.index} waited {message.timeout_s:g} s for {what}"
            ),
        )
        self._close_outgrown()  # all ranks agreed to the present ones
        tracks = ProcessTracks(f"agent {self._config.index}", TrackKind.AGENT, wanted=message.trace)
        if message.trace:
            tracks.timer = writer.trace()
        if self._remote is not None:
            stats = self._remote.fetch(self._outgoing.steps, writer=writer, poller=poller, spans=tracks.spans)
        elif self._relay is None or self._neighbours is None or self._slots is None:
            stats = send(self._outgoing, writer=writer, poller=poller, spans=tracks.spans)
        else:
            assert self._manifest is not None
            inlets, outlets = self._neighbours.meet(self._relay, self._check)
            stats = relay_all(
                self._outgoing,
                self._relay,
                inlets=inlets,
                outlets=outlets,
                slots=self._slots,
                writer=writer,
                pool=self._pool,
                manifest=self._manifest,
                poller=poller,
                spans=tracks.spans,
            )
        stats = msgspec.structs.replace(stats, tracks=tracks.take())
        self._pool.check_unchanged()
        return wire.Sent(stats=stats)

    def _close_ring(self, _message: object) -> wire.RingClosed:
        self._close_outgrown()
        neighbours, self._neighbours = self._neighbours, None
        if neighbours is not None:
            neighbours.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._let_go_of_slots()  # not before the ring: its device may still copy out of them
        if self._remote is not None:
            self._remote.free()
        return wire.RingClosed()

    def _let_go_of_remote(self) -> None:
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def _let_go_of_slots(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.close()

    def _close_outgrown(self) -> None:
        while self._outgrown:
            self._outgrown.pop().close()

    def _check(self) -> None:
        _check_parent()
        self._line.check_abort()


def main() -> None:
    """Entry point of the process."""
    config = msgspec.json.decode(_first_line(), type=AgentConfig)
    logging.basicConfig(level=config.log_level, format=f"ckpt-agent {config.index}: %(levelname)s %(message)s")
    if config.device != CPU:
        _log.info("%s", numa.bind(probe.pci_bus_id(driver.ordinal_of(config.device))).reason)
    try:
        with Line(
            config.address,
            config.token,
            config.silence_timeout_s,
            server_key=config.server_key,
            watch=bool(config.server_key),
        ) as line:
            Agent(config, line).run()
    except CkptError as error:
        _log.warning("ending: %s", error)
        if _is_orphan(config.parent):
            for orphan in config.orphans:
                remove_directory(Path(orphan))
        sys.exit(1)


def _first_line() -> bytes:
    """Standard input up to the first newline, unbuffered: the rest is watched for its end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("ckpt_core.agent is started by ckpt, with its configuration on standard input")
        line += byte
    return line


def _check_parent() -> None:
    readable, _, _ = select.select([0], [], [], 0)
    if readable and not os.read(0, 1):
        raise ControllerLost("the controller closed its end: it is gone")


def _is_orphan(parent: int) -> bool:
    """Whether the controller is gone. Its pipes close a moment before its children get another parent."""
    deadline = time.monotonic() + _ORPHANED_WITHIN_S
    while os.getppid() == parent:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    main()
