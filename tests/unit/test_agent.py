"""Agent processes: asked over their line, gone when told to, when their parent goes, or when nothing is heard."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from ckpt_core import agent_process, process, wire
from ckpt_core.agent import AgentConfig
from ckpt_core.agents import AgentGroup
from ckpt_core.channel import Hub
from ckpt_core.conversation import Conversation
from ckpt_core.dtypes import DType
from ckpt_core.errors import CkptError, ManifestError, PeerLost, TransportError
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.layout import whole_layout
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.plan import make_plan
from ckpt_core.pool_file import stage_tensors
from ckpt_core.source import Extent, SourceFile, SourceIndex

WAIT_S = 30.0


@pytest.fixture
def talk(tmp_path):
    (tmp_path / "sockets").mkdir()
    (tmp_path / "memory").mkdir()
    with contextlib.closing(Hub(tmp_path / "sockets")) as hub:
        hub.allow("t")
        with contextlib.closing(Conversation(hub, ping_every_s=1.0)) as made:
            yield made


@pytest.fixture
def group_of(talk, tmp_path):
    with contextlib.ExitStack() as stack:

        def group_of(count=1):
            group = AgentGroup(
                ["cpu"] * count,
                conversation=talk,
                directory=tmp_path / "memory",
                token="t",  # noqa: S106
                silence_timeout_s=WAIT_S,
            )
            stack.callback(group.stop)
            group.join(WAIT_S)
            return group

        yield group_of


@pytest.fixture
def index(tmp_path):
    tensors = {name: torch.full((1000,), number, dtype=torch.uint8) for number, name in enumerate("abcde")}
    return stage_tensors(tensors, tmp_path)


def open_rings(group, index, ring_bytes):
    pool = group.prepare(index, digest=True, timeout_s=WAIT_S)
    manifest = Manifest.from_index(index, pool.digests)
    layouts = [whole_layout(manifest)] * 3
    plan = make_plan(manifest, layouts, agents=len(group.peers), ring_bytes=ring_bytes, bucket_bytes=4096)
    (offers,) = group.open_rings(plan.ring_bytes, plan.receivers, timeout_s=WAIT_S)  # of the one host
    group.tell_plan(FleetPlan(plans=(plan,), host_of=(0, 0, 0)), "0" * 32, known=False)
    return offers


def test_agents_share_the_digests(group_of, index):
    pool = group_of(2).prepare(index, digest=True, timeout_s=WAIT_S)
    assert pool.digests == {name: content_digest(bytes([number]) * 1000) for number, name in enumerate("abcde")}


def test_agents_take_a_plan_and_the_same_again(group_of, talk, index):
    group = group_of(2)
    open_rings(group, index, 4096)
    first = talk.gather(dict.fromkeys(group.peers, wire.PlanTaken), timeout_s=WAIT_S)
    manifest = Manifest.from_index(index)
    plan = make_plan(manifest, [whole_layout(manifest)] * 3, agents=2, ring_bytes=4096, bucket_bytes=4096)
    assert {reply.digest for reply in first.values()} == {plan.digest}
    group.tell_plan(FleetPlan(plans=(plan,), host_of=(0, 0, 0)), "0" * 32, known=True)
    assert talk.gather(dict.fromkeys(group.peers, wire.PlanTaken), timeout_s=WAIT_S) == first


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"boot_id": "elsewhere", "host": "far"}, "runs on host far"),
        ({"uid": 12345}, "runs as uid 12345"),
        ({"ipc_namespace": "ipc:[1]"}, "--ipc=host"),
    ],
)
def test_who_cannot_share_memory_has_no_host_here(group_of, changed, says):
    group = group_of()
    assert group.host_of(process.current(), "rank 0") == 0
    with pytest.raises(TransportError, match=f"rank 0 .*{says}"):
        group.host_of(msgspec.structs.replace(process.current(), **changed), "rank 0")


def test_rings_are_made_anew_and_given_back(group_of, index, tmp_path):
    group = group_of(2)
    for ring_bytes in (4096, 8192):
        offers = open_rings(group, index, ring_bytes)
        assert [(offer.owner, offer.size_bytes) for offer in offers] == [(0, ring_bytes), (1, ring_bytes)]
        assert all(Path(offer.handle).stat().st_size == ring_bytes for offer in offers)
    group.close_rings(timeout_s=WAIT_S)
    group.close_rings(timeout_s=WAIT_S)
    assert list((tmp_path / "memory").rglob("*-[01]")) == []


def test_stop_leaves_no_process_and_no_memory(group_of, index, tmp_path):
    group = group_of(2)
    open_rings(group, index, 4096)
    assert group.alive
    group.stop()
    assert not group.alive
    assert [path for path in (tmp_path / "memory").rglob("*") if path.is_file()] == []


def test_a_file_that_changed_since_it_was_indexed_is_reported_by_its_name(group_of, index):
    path = Path(index.files[0].path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ManifestError, match=f"agent [01], in Prepare: .*{path.name}.* changed since"):
        group_of(2).prepare(index, digest=True, timeout_s=WAIT_S)


def test_an_agent_goes_on_after_a_failure(group_of, index):
    group = group_of()
    path = Path(index.files[0].path)
    stat = path.stat()
    os.utime(path, ns=(1, 1))
    with pytest.raises(ManifestError):
        group.prepare(index, digest=True, timeout_s=WAIT_S)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(group.prepare(index, digest=True, timeout_s=WAIT_S).digests) == 5


def test_what_an_agent_has_no_use_for_is_refused(group_of, talk):
    group = group_of()
    with pytest.raises(CkptError, match="an agent has no use for a Begin"):
        talk.ask(dict.fromkeys(group.peers, wire.Begin()), wire.RingClosed, timeout_s=WAIT_S)


def test_a_killed_agent_is_noticed_and_another_group_takes_over(group_of, index):
    group = group_of()
    open_rings(group, index, 4096)
    os.kill(group.pids[0], signal.SIGKILL)
    with pytest.raises(PeerLost, match="agent 0 died"):
        group.prepare(index, digest=True, timeout_s=WAIT_S)
    group.stop()
    other = group_of()
    assert open_rings(other, index, 8192)[0].size_bytes == 8192


def test_a_stopped_agent_is_killed_in_the_end(group_of, monkeypatch):
    monkeypatch.setattr(agent_process, "_STOP_TIMEOUT_S", 0.2)
    group = group_of()
    os.kill(group.pids[0], signal.SIGSTOP)
    group.stop()
    assert not group.alive


# -- one agent by itself -----------------------------------------------------------------------------------------
@pytest.fixture
def start(tmp_path):
    """Starts an agent against a hub of this test."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(contextlib.closing(Hub(tmp_path)))
        hub.allow("t")

        def start(**changes):
            config = AgentConfig(address=hub.address, token="t", index=0, count=1, directory=str(tmp_path))  # noqa: S106
            child = subprocess.Popen(
                [sys.executable, "-m", "ckpt_core.agent"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.callback(child.communicate)
            stack.callback(child.kill)
            config = msgspec.structs.replace(config, **changes)
            child.stdin.write(msgspec.json.encode(config) + b"\n")
            child.stdin.flush()
            ((_, hello),) = list(hub.receive(WAIT_S))
            assert isinstance(hello, wire.AgentHello)
            assert hello.process.pid == child.pid
            return child

        yield start


def test_an_agent_ends_with_its_parents_pipe(start):
    child = start()
    child.stdin.close()
    assert child.wait(WAIT_S) == 1
    assert b"the controller closed its end" in child.stderr.read()
    child.stdin = None


def test_an_agent_ends_when_it_hears_nothing(start):
    assert start(silence_timeout_s=0.3).wait(WAIT_S) == 1


def test_without_configuration_it_says_who_starts_it():
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_core.agent"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b"started by ckpt" in done.stderr


def test_no_secret_is_in_the_process_list(start):
    child = start()
    assert b"ckpt_core.agent" in Path(f"/proc/{child.pid}/cmdline").read_bytes()
    assert Path(f"/proc/{child.pid}/cmdline").read_bytes().count(b"\0") == 3


def test_an_agent_imports_no_torch(start):
    child = start()
    assert "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text()


def test_an_agent_that_digests_hears_that_it_is_to_stop(group_of, talk, tmp_path):
    part, parts = 1 << 30, 6  # each takes some tenths of a second: it looks for messages in between
    with (tmp_path / "large").open("wb") as file:
        file.truncate(part * parts)
    source = SourceFile.of(tmp_path / "large")
    extents = tuple(
        Extent(name=f"t{number}", dtype=DType.U8, shape=(part,), file=0, offset_bytes=number * part, size_bytes=part)
        for number in range(parts)
    )
    group = group_of()
    (peer,), (pid,) = group.peers, group.pids
    began = []
    talk.on_progress = lambda _name, progress: began.append(progress)
    index = SourceIndex(files=(source,), extents=extents)
    talk.tell(peer, wire.Prepare(index=index, digest=tuple(extent.name for extent in extents)))
    talk.idle_until(lambda: bool(began), timeout_s=WAIT_S)
    assert began[0].done_bytes < part * parts
    talk.tell(peer, wire.Stop())
    talk.idle_until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, timeout_s=WAIT_S)
    assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
