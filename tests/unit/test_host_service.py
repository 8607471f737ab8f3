"""The agents of a host of a cluster: there while their service is, started anew when one ends, gone with all they made."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from ckpt_core import cluster
from ckpt_core.channel import Hub
from ckpt_core.cluster_agents import ClusterAgents
from ckpt_core.config import Reading
from ckpt_core.conversation import Conversation
from ckpt_core.errors import PeerLost
from ckpt_core.host_service import HostService
from ckpt_core.pool_file import stage_tensors

WAIT_S = 30.0


@pytest.fixture
def paths(tmp_path):
    """The controller's file and the agents'."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    return cluster.create(tmp_path / "keys", address)


@pytest.fixture
def memory(tmp_path):
    made = tmp_path / "memory"
    made.mkdir()
    return made


class Controller:
    """What an update has of one: its hub, its talk and its agents."""

    def __init__(self, key, stack):
        hub = stack.enter_context(contextlib.closing(Hub(cluster=key)))
        self.talk = stack.enter_context(contextlib.closing(Conversation(hub, ping_every_s=1.0)))
        self.agents = ClusterAgents(self.talk, token=key.token, reading=Reading.STRIPED)

    def pids(self):
        return [self.talk.agents[peer].process.pid for peer in self.agents.peers]


@pytest.fixture
def controller(paths):
    with contextlib.ExitStack() as stack:
        yield Controller(cluster.load(paths[0], controller=True), stack)


@pytest.fixture
def service(paths, memory):
    key = cluster.load(paths[1], controller=False)
    made = HostService(key, reached_at="127.0.0.1", devices=["cpu", "cpu"], memory_root=memory, nic_gb_s=12.5)
    with made:
        yield made


@pytest.fixture
def command(paths, memory):
    """`ckpt agent`, as a process of its own."""
    arguments = ["agent", "--cluster", paths[1], "--address", "127.0.0.1", "--count", "2"]
    environment = {**os.environ, "CKPT_SHM_DIR": str(memory), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-m", "ckpt_core", *arguments], env=environment) as child:
        yield child
        child.kill()


def wait_for_end_of(*pids):
    """Of processes that are no children of this one."""
    deadline = time.monotonic() + WAIT_S
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"{pid} lives"
            finally:
                os.close(fd)


def test_its_agents_dial_in_and_work(service, controller, memory, tmp_path):
    controller.agents.join(1, WAIT_S)
    (host,) = controller.agents.hosts
    assert host.name == f"{socket.gethostname()} (127.0.0.1)"
    assert host.nic_gb_s == 12.5
    assert len(host.peers) == 2
    assert len(list(memory.iterdir())) == 2
    pool = controller.agents.prepare(
        stage_tensors({"a": torch.ones(5), "b": torch.ones(7)}, tmp_path), digest=True, timeout_s=WAIT_S
    )
    assert sorted(pool.digests) == ["a", "b"]
    ((one, other),) = controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
    assert [(ring.owner, ring.size_bytes) for ring in (one, other)] == [(0, 4096), (1, 4096)]
    assert all(str(memory) in ring.handle for ring in (one, other))
    controller.agents.close_rings(timeout_s=WAIT_S)
    assert controller.agents.alive


def test_leaving_ends_all_processes_and_removes_what_they_made(paths, memory, controller):
    key = cluster.load(paths[1], controller=False)
    with HostService(key, reached_at="127.0.0.1", devices=["cpu", "cpu"], memory_root=memory):
        controller.agents.join(1, WAIT_S)
        controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
        pids = controller.pids()
        assert [path for path in memory.rglob("*") if path.is_file()]
    assert list(memory.iterdir()) == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_leaving_ends_agents_whose_controller_never_came(paths, memory):
    key = cluster.load(paths[1], controller=False)
    with HostService(key, reached_at="127.0.0.1", devices=["cpu"], memory_root=memory):
        assert len(list(memory.iterdir())) == 1
    assert list(memory.iterdir()) == []


def test_leaving_ends_agents_that_are_stopped(paths, memory, controller, monkeypatch):
    monkeypatch.setattr("ckpt_core.agent_process._STOP_TIMEOUT_S", 0.3)
    key = cluster.load(paths[1], controller=False)
    with HostService(key, reached_at="127.0.0.1", devices=["cpu"], memory_root=memory):
        controller.agents.join(1, WAIT_S)
        (pid,) = controller.pids()
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(memory.iterdir()) == []


# -- as a command ------------------------------------------------------------------------------------------------
def test_another_takes_the_place_of_a_killed_agent_and_that_is_noticed(command, controller, memory):
    controller.agents.join(1, WAIT_S)
    controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
    killed, left = controller.pids()
    assert [controller.talk.agents[peer].agent for peer in controller.agents.peers] == [0, 1]
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while controller.agents.alive:
        assert time.monotonic() < deadline
    with pytest.raises(PeerLost, match=r"agent 0 of host .* \(127\.0\.0\.1\) died during the update"):
        controller.agents.check_replaced()
    assert not list(memory.rglob("*-0-*")), "nor is its ring there any more"
    controller.agents.stop()
    controller.agents.join(1, WAIT_S)  # all are new ones
    assert not {killed, left} & set(controller.pids())
    assert controller.agents.alive


def test_agents_serve_one_controller_after_the_other(command, paths, memory):
    key = cluster.load(paths[0], controller=True)
    before = set()
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            controller = Controller(key, stack)
            controller.agents.join(1, WAIT_S)
            pids = set(controller.pids())
            assert not pids & before
            controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
        wait_for_end_of(*pids)  # nobody told them: the connection ended
        before = pids


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop_leaves_nothing(command, controller, memory, number):
    controller.agents.join(1, WAIT_S)
    controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
    pids = controller.pids()
    command.send_signal(number)
    assert command.wait(WAIT_S) == 0
    wait_for_end_of(*pids)
    assert list(memory.iterdir()) == []


def test_a_command_that_is_killed_takes_its_agents_and_their_memory_along(command, controller, memory):
    controller.agents.join(1, WAIT_S)
    controller.agents.open_rings(4096, 1, timeout_s=WAIT_S)
    pids = controller.pids()
    command.kill()
    wait_for_end_of(*pids)
    assert list(memory.iterdir()) == []
