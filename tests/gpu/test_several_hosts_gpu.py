"""Two GPUs as two hosts: IPC namespaces of their own on one machine, agents that relay over loopback, rings on GPUs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

import ckpt_core
from ckpt_core import cluster
from ckpt_core.config import MIB, child_environment
from ckpt_core.errors import Outcome, UpdateAborted
from ckpt_core.metrics import Stage

pytestmark = [
    pytest.mark.gpu2,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nsenter"), reason="needs root and nsenter"),
]
STOP_S = 15.0


class Hosts:
    """Ranks on two hosts, and `ckpt agent` beside each."""

    def __init__(self, ranks, services: list[subprocess.Popen[bytes]], key: Path) -> None:
        self.ranks, self.services, self.key = ranks, services, key

    def updater(self, *, reading: ckpt_core.Reading, on_progress=None, **config) -> ckpt_core.Updater:
        from mock_engine import plugin

        target = ckpt_core.Target(engine="mock", url="mock", handle=self.ranks, plugin=plugin())
        return ckpt_core.Updater(
            [target],
            config=ckpt_core.UpdateConfig(fingerprint=False, silence_timeout_s=5, **config),
            on_progress=on_progress,
            cluster=ckpt_core.Cluster.load(self.key, hosts=2, reading=reading),
        )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    from mock_engine import MockEngine, gpu_uuid
    from mock_worker import MockOptions

    options = MockOptions(model="qwen3-30b-a3b", layers=1, world=2, device="cuda", apart=True)
    uuids = [gpu_uuid(index) for index in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    controller, agent = cluster.create(tmp_path_factory.mktemp("keys") / "keys", address)
    with ExitStack() as stack:
        ranks = stack.enter_context(MockEngine(options, uuids))
        services = []
        for number, (pid, uuid) in enumerate(zip(ranks.pids, uuids, strict=True)):
            enter = ["nsenter", f"--ipc=/proc/{pid}/ns/ipc", sys.executable, "-m", "ckpt_core", "agent"]
            command = [*enter, "--cluster", str(agent), "--address", f"127.0.0.{number + 2}"]
            service = subprocess.Popen(command, env=child_environment(visible_gpu=uuid))
            stack.callback(service.wait, STOP_S)
            stack.callback(service.terminate)
            services.append(service)
        yield Hosts(ranks, services, controller)


@pytest.mark.parametrize("reading", [ckpt_core.Reading.STRIPED, ckpt_core.Reading.EVERYWHERE])
def test_bits_are_those_of_the_checkpoint(hosts, checkpoints: dict[int, Path], reading: ckpt_core.Reading) -> None:
    with hosts.updater(reading=reading) as moving:
        for seed in (1, 2, 1):
            hosts.ranks.call("poison")
            report = moving.update(checkpoints[seed])
            assert report.outcome is Outcome.COMMITTED
            assert hosts.ranks.call("wrong", seed) == [0, 0]
    for host in report.hosts:
        assert host.lacked_bytes <= host.network_in_bytes <= 1.01 * host.lacked_bytes
        assert (host.network_in_bytes > 0) == (reading is ckpt_core.Reading.STRIPED)


def test_a_killed_agent_ends_the_update_and_the_next_one_works(hosts, checkpoints: dict[int, Path]) -> None:
    killed: list[int] = []

    def kill(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.TRANSFER and 0 < done < total and not killed:
            killed.append(psutil.Process(hosts.services[1].pid).children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    striped = ckpt_core.Reading.STRIPED
    with hosts.updater(reading=striped, on_progress=kill, ring_bytes=8 * MIB, bucket_bytes=MIB) as moving:
        with pytest.raises(UpdateAborted) as caught:
            moving.update(checkpoints[2])
        assert killed
        assert caught.value.outcome is Outcome.POISONED
        hosts.ranks.call("synchronize")  # the survivors' streams drain
        moving.update(checkpoints[2])
        assert hosts.ranks.call("wrong", 2) == [0, 0]
