"""An engine over several hosts: ranks of other hosts are started by their node, and carry out commands over TCP.

    python -m ckpt_conformance.reference MODEL --tp 4 --nodes 2 --host 10.0.0.1 --nodes-port 29500    on the first host
    python -m ckpt_conformance.reference.nodes 10.0.0.1:29500 --ranks 2                               on the second

As with engines (vLLM's and SGLang's `--nnodes`), the network between them is trusted: whoever reaches the port can take part.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection

import msgspec

from ckpt_conformance.reference.options import RankSpec
from ckpt_core.config import child_environment
from ckpt_core.errors import RendezvousTimeout

_SIOCGIFADDR = 0x8915
_AGAIN_S = 0.1


class NodeListener:
    """Where nodes come to get their ranks' specs, at the first host.

    Args:
        address: of this host; also where ranks find each other.
        port: that nodes connect to.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self._listening = socket.create_server((address, port), backlog=128)

    def accept(self, timeout_s: float) -> Connection:
        """The next rank's connection.

        Raises:
            RendezvousTimeout: no node came.
        """
        self._listening.settimeout(timeout_s)
        try:
            connection, _ = self._listening.accept()
        except TimeoutError as error:
            raise RendezvousTimeout(f"no node connected within {timeout_s:g} s; start it on its host") from error
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Connection(connection.detach())

    def close(self) -> None:
        """Take no more."""
        self._listening.close()


def start_rank(spec: RankSpec, *, interface: str, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a rank's process.

    Args:
        interface: network interface that its collectives use.
        inherited: file descriptors that its spec names.
    """
    # gloo would resolve the host's name, and listen on whatever that is
    threads = str(spec.pool.threads)
    environment = {**child_environment(), "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "ckpt_conformance.reference.rank_process", msgspec.json.encode(spec).decode()]
    return subprocess.Popen(
        command, pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
    )


def interface_of(address: str) -> str:
    """Name of the network interface with that IPv4 address; "lo" where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(found) == address:
                return name
    return "lo"


def main(argv: Sequence[str] | None = None) -> int:
    """Run some ranks of an engine on this host, until they end."""
    parser = argparse.ArgumentParser(prog="python -m ckpt_conformance.reference.nodes", description=__doc__)
    parser.add_argument("head", help="host:port of the engine's first host")
    parser.add_argument("--ranks", type=int, default=1, help="how many of its ranks run here")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="to reach it")
    options = parser.parse_args(argv)
    ranks = [_run_rank(options.head, time.monotonic() + options.timeout_s) for _ in range(options.ranks)]
    return max(rank.wait() for rank in ranks)


def _run_rank(head: str, deadline: float) -> subprocess.Popen[bytes]:
    with closing(_connect(head, deadline)) as connection:
        here = connection.getsockname()[0]
        with closing(Connection(os.dup(connection.fileno()))) as pipe:
            spec = msgspec.json.decode(pipe.recv_bytes(), type=RankSpec)
        spec = msgspec.structs.replace(spec, pipe_fd=connection.fileno(), parent_pid=os.getpid())
        return start_rank(spec, interface=interface_of(here), inherited=[connection.fileno()])


def _connect(head: str, deadline: float) -> socket.socket:
    host, _, port = head.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 0.1))
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousTimeout(f"the engine's first host does not answer at {head}: {error}") from error
            time.sleep(_AGAIN_S)  # it may not be up yet
        else:
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


if __name__ == "__main__":
    sys.exit(main())
