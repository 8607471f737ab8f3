"""The server's side of the rank processes: start them, send each command to all, notice when one is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait

import msgspec

from ckpt_conformance.reference.messages import Command, Exit, Reply
from ckpt_conformance.reference.nodes import NodeListener, interface_of, start_rank
from ckpt_conformance.reference.options import RankPoolOptions, RankSpec
from ckpt_core.errors import EngineError, EngineStateError, PeerLost

_EXIT_TIMEOUT_S = 2.0


class RankPool:
    """One process per rank. Must be made in a thread that lives as long as the ranks shall.

    Raises (any call):
        PeerLost: a rank is gone or does not answer; the pool is of no use any more.
    """

    def __init__(self, options: RankPoolOptions) -> None:
        self.options = options
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []  # of this host's ranks, which are the first
        self._nodes: NodeListener | None = None
        with ExitStack() as stack:
            listener, exchange_fd = None, -1
            if options.nodes > 1:
                self._nodes = NodeListener(options.node_address, options.node_port)
            if options.tp_size > 1:
                listener = stack.enter_context(_listener(options.node_address))
            if options.tp_size > 1 and options.nodes == 1:
                exchange_fd = os.memfd_create("tp-exchange")
                stack.callback(os.close, exchange_fd)
            self._store_port = listener.getsockname()[1] if listener is not None else 0
            for rank in range(options.local_ranks):
                self._spawn(rank, listener, exchange_fd)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of this host's ranks."""
        return tuple(process.pid for process in self._processes)

    @property
    def pipes(self) -> tuple[Connection, ...]:
        """Readable between commands only when a rank is gone."""
        return tuple(self._pipes)

    def wait_ready(self) -> list[Reply]:
        """Wait until every rank has its weights.

        Raises:
            EngineError: a rank could not start.
            RendezvousTimeout: a node did not come.
        """
        if self._nodes is not None:
            for rank in range(self.options.local_ranks, self.options.tp_size):
                pipe = self._nodes.accept(self.options.start_timeout_s)
                pipe.send_bytes(msgspec.json.encode(self._spec(rank, pipe_fd=-1, store_fd=-1, exchange_fd=-1)))
                self._pipes.append(pipe)
            self._nodes.close()
        return self._accept(self._gather(self.options.start_timeout_s))

    def call(self, command: Command, *, timeout_s: float = 0.0) -> list[Reply]:
        """Send a command to all ranks and wait for all answers.

        Raises:
            EngineStateError: a rank refused; all go on.
            EngineError: a rank failed; they may be out of step.
        """
        data = msgspec.msgpack.encode(command)
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(data)
            except OSError as error:
                raise self._lost(rank) from error
        return self._accept(self._gather(timeout_s or self.options.step_timeout_s))

    def explain(self, pipe: object) -> EngineError | PeerLost:
        """Why a pipe is readable although nothing was asked."""
        assert isinstance(pipe, Connection)
        try:
            rank, _ = self._read(pipe)
        except PeerLost as error:
            return error
        return EngineError(f"rank {rank} spoke without being asked; restart the engine")

    def close(self) -> None:
        """End all ranks: asked first, killed when they do not go. Only from the thread that calls."""
        data = msgspec.msgpack.encode(Exit())
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except OSError:
                continue  # gone already
        deadline = time.monotonic() + _EXIT_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.kill()
        for pipe in self._pipes:
            pipe.close()
        if self._nodes is not None:
            self._nodes.close()

    def kill(self) -> None:
        """Kill all ranks at once; any thread may do so. Calls in progress end with PeerLost."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(_EXIT_TIMEOUT_S)

    def _spawn(self, rank: int, listener: socket.socket | None, exchange_fd: int) -> None:
        ours, theirs = socket.socketpair()
        store_fd = listener.fileno() if listener is not None and rank == 0 else -1
        with theirs:
            spec = self._spec(rank, pipe_fd=theirs.fileno(), store_fd=store_fd, exchange_fd=exchange_fd)
            inherited = [fd for fd in (theirs.fileno(), exchange_fd, store_fd) if fd >= 0]
            interface = interface_of(self.options.node_address) if self.options.nodes > 1 else "lo"
            process = start_rank(spec, interface=interface, inherited=inherited)
        self._processes.append(process)
        self._pipes.append(Connection(ours.detach()))

    def _spec(self, rank: int, *, pipe_fd: int, store_fd: int, exchange_fd: int) -> RankSpec:
        return RankSpec(
            pool=self.options,
            rank=rank,
            pipe_fd=pipe_fd,
            store_fd=store_fd,
            exchange_fd=exchange_fd,
            store_host=self.options.node_address,
            store_port=self._store_port,
            parent_pid=os.getpid(),
        )

    def _gather(self, timeout_s: float) -> list[Reply]:
        deadline = time.monotonic() + timeout_s
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._pipes):
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerLost(f"ranks {self._absent(replies)} did not answer within {timeout_s:g} s")
            replies.update(self._read(pipe) for pipe in ready if isinstance(pipe, Connection))
        return [replies[rank] for rank in range(len(self._pipes))]

    def _read(self, pipe: Connection) -> tuple[int, Reply]:
        rank = self._pipes.index(pipe)
        try:
            return rank, msgspec.msgpack.decode(pipe.recv_bytes(), type=Reply)
        except (EOFError, OSError) as error:
            raise self._lost(rank) from error

    def _accept(self, replies: Sequence[Reply]) -> list[Reply]:
        failed = [(rank, reply) for rank, reply in enumerate(replies) if reply.error]
        if not failed:
            return list(replies)
        text = "; ".join(_unique(f"rank {rank}: {reply.error}" for rank, reply in failed))
        # if only some refused, the others did something: that is a failure, not a refusal
        if len(failed) == len(replies) and all(reply.refused for _, reply in failed):
            raise EngineStateError(text)
        raise EngineError(text)

    def _absent(self, replies: dict[int, Reply]) -> list[int]:
        return [rank for rank in range(len(self._pipes)) if rank not in replies]

    def _lost(self, rank: int) -> PeerLost:
        if rank >= len(self._processes):
            return PeerLost(f"rank {rank}, on another host, is gone; look into its node's log, and restart the engine")
        process = self._processes[rank]
        try:
            code: int | None = process.wait(_EXIT_TIMEOUT_S)  # its pipe closes a moment before it ends
        except subprocess.TimeoutExpired:
            code = None
        return PeerLost(f"rank {rank} (pid {process.pid}) is gone, exit code {code}; restart the engine")


def _unique(texts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(128)
    return listener
