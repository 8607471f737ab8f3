"""A cluster on one machine: hosts as network namespaces, each with agents, and reference engines over one or several of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt_conformance.namespaces import NetHosts
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core import cluster
from ckpt_core.api import Cluster
from ckpt_core.config import Reading, child_environment

_CONTROL_PORT = 7777
_NODES_PORT = 29500
_STOP_TIMEOUT_S = 15.0
_GBIT_S = 1000
RANKS_PER_HOST = 2


class EngineCluster:
    """A context manager. This process is the controller, on a host of its own.

    Args:
        directory: for the cluster's keys.
        hosts: how many.
        mbit_s: rate of each one's link, each way.
        nic_gb_s: what it carries of data, for predictions; 0 for the same.

    Attributes:
        net: the hosts.
        controller_file: for who updates.
        services: processes of `ckpt agent`, by host.
    """

    def __init__(self, directory: Path, *, hosts: int = 4, mbit_s: int = _GBIT_S, nic_gb_s: float = 0.0) -> None:
        self._directory = directory
        self._count = hosts
        self._mbit_s = mbit_s
        self._nic_gb_s = nic_gb_s or mbit_s / 8000
        self._stack = ExitStack()
        self.services: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> EngineCluster:
        with self._stack:
            self.net = self._stack.enter_context(NetHosts(self._count, mbit_s=self._mbit_s))
            address = f"tcp://{self.net.gateway}:{_CONTROL_PORT}"
            self.controller_file, self._agent_file = cluster.create(self._directory, address)
            for host in self.net.hosts:
                self.services.append(self._start_agents(host.address, host.prefix))
            self._stack = self._stack.pop_all()
        return self

    def start_agents_here(self) -> None:
        """On the controller's own host, too: it can read checkpoints then."""
        self.services.append(self._start_agents(self.net.gateway, ()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def membership(self, reading: Reading) -> Cluster:
        """For an Updater in this process."""
        return Cluster.load(self.controller_file, hosts=len(self.services), reading=reading)

    def engines(self, model: Path | str, *, tp: int, extra: Sequence[str] = ()) -> list[ReferenceServer]:
        """Engines on all hosts, each over as many as its ranks need."""
        nodes = -(-tp // RANKS_PER_HOST)
        heads = range(0, self._count, nodes)
        return [self._start_engine(model, first, nodes, tp, extra) for first in heads]

    def _start_engine(
        self, model: Path | str, first: int, nodes: int, tp: int, extra: Sequence[str]
    ) -> ReferenceServer:
        head = self.net.hosts[first]
        for host in self.net.hosts[first + 1 : first + nodes]:
            arguments = ["ckpt_conformance.reference.nodes", f"{head.address}:{_NODES_PORT}", f"--ranks={tp // nodes}"]
            self._start(host.prefix, *arguments)
        over = [f"--nodes={nodes}", f"--nodes-port={_NODES_PORT}"] if nodes > 1 else []
        server = ReferenceServer(model, tp=tp, extra=[f"--host={head.address}", *over, *extra], prefix=head.prefix)
        return self._stack.enter_context(server)

    def _start_agents(self, address: str, prefix: Sequence[str]) -> subprocess.Popen[bytes]:
        options = ["--cluster", str(self._agent_file), "--address", address, "--count", str(RANKS_PER_HOST)]
        return self._start(prefix, "ckpt_core", "agent", *options, "--nic-gb-s", str(self._nic_gb_s))

    def _start(self, prefix: Sequence[str], *module: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*prefix, sys.executable, "-m", *module], env=child_environment())
        self._stack.callback(end, process)
        return process


def end(process: subprocess.Popen[Any]) -> None:
    """Tell it to end, and kill it where it does not."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
