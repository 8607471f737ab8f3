"""The process of one rank: builds the worker, then carries out one command at a time from the server's pipe."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

import msgspec
import torch
import xxhash

from ckpt_conformance.reference import messages
from ckpt_conformance.reference.exchange import Exchange
from ckpt_conformance.reference.messages import Command, Reply
from ckpt_conformance.reference.options import ENGINE_NAME, RankSpec
from ckpt_conformance.reference.parallel import TpGroup, join_group, open_store
from ckpt_conformance.reference.worker import Worker
from ckpt_core.errors import CkptError, EngineStateError
from ckpt_core.plugins import EnginePlugin

_PR_SET_PDEATHSIG = 1
_log = logging.getLogger(__name__)


def main() -> int:
    """Run a rank until the server says so or goes away."""
    spec = msgspec.json.decode(sys.argv[1], type=RankSpec)
    _die_with_parent(spec.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    logging.basicConfig(level=logging.WARNING, format=f"rank {spec.rank}: %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(spec.pool.threads)
    pipe = Connection(spec.pipe_fd)
    try:
        server = RankServer(spec)
    except (CkptError, OSError, RuntimeError) as error:
        pipe.send_bytes(msgspec.msgpack.encode(Reply(error=f"{type(error).__name__}: {error}")))
        return 1
    pipe.send_bytes(msgspec.msgpack.encode(server.reply()))
    return _serve(server, pipe)


class RankServer:
    """Carries out commands on a worker."""

    def __init__(self, spec: RankSpec) -> None:
        self.plugin = EnginePlugin(importlib.import_module(spec.pool.plugin), name=ENGINE_NAME)
        self.worker = Worker(
            spec.pool.model_dir, spec.pool.worker, group=_join(spec), instance_id=spec.pool.instance_id
        )

    def answer(self, command: Command) -> Reply:
        """Carry out one command; what it raises is in the reply."""
        try:
            return self._carry_out(command)
        except EngineStateError as error:
            return self.reply(error=str(error), refused=True)
        except Exception as error:  # noqa: BLE001 (the reply carries it to the server)
            _log.exception("%s failed", type(command).__name__)
            return self.reply(error=f"{type(error).__name__}: {error}")

    def reply(self, **fields: object) -> Reply:
        """A reply with the worker's present state."""
        worker = self.worker
        state = Reply(
            state=worker.state.value,
            detail=worker.detail,
            version=worker.version,
            asleep=sorted(worker.asleep),
            device_uuid=worker.device_uuid,
        )
        return msgspec.structs.replace(state, **fields)

    def _carry_out(self, command: Command) -> Reply:
        worker = self.worker
        match command:
            case messages.Step():
                return self.reply(token_ids=worker.step(command.items))
            case messages.Free():
                worker.kv.free(command.sequence_ids)
            case messages.SetPaused():
                worker.paused = command.paused
            case messages.FlushCache():
                worker.flush_cache()
            case messages.Sleep():
                worker.sleep()
            case messages.Wake():
                worker.wake(command.tags)
            case messages.Attach():
                result = worker.attach(command.rendezvous, self.plugin)
                return self.reply(outcome=result.outcome, attach_error=result.error)
            case messages.Digest():
                return self.reply(digests=live_digests(worker))
            case messages.Exit():
                pass
        return self.reply()


def live_digests(worker: Worker) -> dict[str, str]:
    """xxh3-128 of the bytes of every live tensor, by name."""
    return {
        name: xxhash.xxh3_128_hexdigest(live.tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        for name, live in worker.live().items()
    }


def _serve(server: RankServer, pipe: Connection) -> int:
    # no deadline between commands: a server that goes away closes the pipe, and the kernel ends this process
    while True:
        try:
            command: Command = msgspec.msgpack.decode(pipe.recv_bytes(), type=Command)
            if isinstance(command, messages.Exit):
                return 0
            pipe.send_bytes(msgspec.msgpack.encode(server.answer(command)))
        except (EOFError, ConnectionError):
            return 0


def _join(spec: RankSpec) -> TpGroup:
    size, timeout_s = spec.pool.tp_size, spec.pool.step_timeout_s
    if size == 1:
        return TpGroup()
    store = open_store(spec.store_host, spec.store_port, listen_fd=spec.store_fd, timeout_s=timeout_s)
    exchange = None
    if spec.exchange_fd >= 0:
        exchange = Exchange(spec.exchange_fd, rank=spec.rank, size=size, timeout_s=timeout_s)
        os.close(spec.exchange_fd)  # mapped now
    return join_group(store, rank=spec.rank, size=size, timeout_s=timeout_s, exchange=exchange)


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the server ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the request
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
