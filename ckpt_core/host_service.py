"""What a host of a cluster runs beside its engines: its agents, started again whenever one ends.

An agent serves one controller: it ends with it, and the next one dials in and waits for the next controller.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_core.agent import AgentConfig
from ckpt_core.agent_process import end, spawn
from ckpt_core.cluster import ClusterKey
from ckpt_core.shm import private_directory, remove_directory

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.2
_SHORT_S, _LATER_S = 2.0, 5.0
_SILENCE_S = 24 * 3600.0  # between updates nobody talks; a controller that is gone is noticed by its connection


@dataclass(slots=True, kw_only=True)
class _Running:
    """An agent, until another takes its place; `again_at_s` is when, where it ended at once."""

    child: subprocess.Popen[bytes]
    directory: Path
    started_s: float
    again_at_s: float = 0.0


class HostService:
    """The agents of this host. A context manager.

    Args:
        key: of the cluster.
        reached_at: address of this host, as the others reach it.
        devices: where the ring of each agent lives: "cpu" or the UUID of a GPU.
        memory_root: where shared memory is made.
        nic_gb_s: what the network carries, GB/s; 0 where it is not known.
    """

    def __init__(
        self,
        key: ClusterKey,
        *,
        reached_at: str,
        devices: Sequence[str],
        memory_root: Path,
        nic_gb_s: float = 0.0,
        log_level: str = "WARNING",
    ) -> None:
        self._key = key
        self._reached_at = reached_at
        self._devices = tuple(devices)
        self._memory_root = memory_root
        self._nic_gb_s = nic_gb_s
        self._log_level = log_level
        self._agents: list[_Running] = []

    def __enter__(self) -> HostService:
        self._agents = [self._start(index) for index in range(len(self._devices))]
        return self

    def __exit__(self, *_: object) -> None:
        end([agent.child for agent in self._agents])
        for agent in self._agents:
            remove_directory(agent.directory)

    def serve(self) -> None:
        """Keep all agents alive until SIGTERM or SIGINT."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        while not stop.wait(_LOOK_EVERY_S):
            self._renew()

    def _renew(self) -> None:
        for index, agent in enumerate(self._agents):
            now = time.monotonic()
            if (status := agent.child.poll()) is None or now < agent.again_at_s:
                continue
            failed_at_once = status and now - agent.started_s < _SHORT_S
            if failed_at_once and not agent.again_at_s:
                _log.warning("agent %d ended at once with status %d; its standard error says why", index, status)
                agent.again_at_s = now + _LATER_S
                continue
            end([agent.child])
            remove_directory(agent.directory)  # what a killed one could not remove
            self._agents[index] = self._start(index)

    def _start(self, index: int) -> _Running:
        directory = private_directory(self._memory_root, "ckpt-")
        started_s = time.monotonic()
        child = spawn(
            AgentConfig(
                address=self._key.address,
                token=self._key.token,
                server_key=self._key.server_key,
                index=index,
                count=len(self._devices),
                directory=str(directory),
                device=self._devices[index],
                parent=os.getpid(),
                orphans=(str(directory),),
                silence_timeout_s=_SILENCE_S,
                reached_at=self._reached_at,
                nic_gb_s=self._nic_gb_s,
                log_level=self._log_level,
            )
        )
        return _Running(child=child, directory=directory, started_s=started_s)
