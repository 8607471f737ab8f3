"""Deaths and silences in the middle of a transfer: a typed outcome within its deadline, and the next update works."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ckpt_core
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_conformance.reference.worker import Worker
from ckpt_core import Outcome, Target, UpdateAborted, wire
from ckpt_core.agreement import Agreement
from ckpt_core.contract import EndpointState
from ckpt_core.conversation import Conversation
from ckpt_core.errors import EngineStateError, PeerLost, TransferTimeout, VerificationError
from ckpt_core.fleet import Fleet
from ckpt_core.verify import fingerprint

SOON_S = 15.0  # far below the deadlines of a transfer; a death must be seen, not waited for


@pytest.fixture(scope="module")
def shared_server(start_server, checkpoint_of):
    return start_server(checkpoint_of(which="a"), tp=2)


@pytest.fixture
def server(shared_server, checkpoint_of):
    """Serves checkpoint A, whatever the test before left."""
    if shared_server.status()["state"] != "serving":
        ckpt_core.update(checkpoint_of(which="a"), [Target(engine="reference", url=shared_server.url)])
    return shared_server


def refused(server):
    """Whether it produces no token, whoever resumes it."""
    server.post("/resume")
    answer = server.client.post("/generate", json={"prompt_token_ids": [5, 17], "max_tokens": 2})
    return answer.status_code in (409, 503)


@contextlib.contextmanager
def aborts(outcome, cause, within_s):
    start = time.monotonic()
    with pytest.raises(UpdateAborted) as caught:
        yield caught
    assert time.monotonic() - start < within_s
    assert caught.value.outcome is outcome
    assert isinstance(caught.value.causes[0], cause), caught.value.causes


def raises(error):
    def call(*_args):
        raise error

    return call


def assert_mended(updater, server, checkpoint_of, answer_of):
    """The same updater brings B and A; afterwards all is as a fresh start on A would be."""
    updater.update(checkpoint_of(which="b"))
    assert updater.update(checkpoint_of(which="a"), version="mended").outcome is Outcome.COMMITTED
    assert server.status()["state"] == "serving"
    assert server.status()["version"] == "mended"
    assert len(answer_of(server)) == 24


@pytest.mark.parametrize("late", [False, True])
def test_an_agent_is_killed_while_engines_are_paused(
    server, checkpoint_of, updater_of, kill, monkeypatch, answer_of, *, late
):
    """Before or after the ranks are called: they are turned away, and the engine serves what it had."""
    before = server.live_digests()
    updater = updater_of(server)
    moment, original = ("attach", Fleet.attach) if late else ("pause", Fleet.pause)

    def then_kill(*args):
        result = original(*args)
        kill(updater.agent_pids[1])
        monkeypatch.setattr(Fleet, moment, original)
        return result

    monkeypatch.setattr(Fleet, moment, then_kill)
    with aborts(Outcome.CLEAN, PeerLost, SOON_S):
        updater.update(checkpoint_of(which="b"))
    assert server.status()["state"] == "serving"
    assert server.live_digests() == before
    assert_mended(updater, server, checkpoint_of, answer_of)


def test_an_agent_is_killed_in_the_middle(server, checkpoint_of, updater_of, stall, kill, answer_of):
    before = server.live_digests()
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[1])
    with aborts(Outcome.POISONED, PeerLost, SOON_S) as caught:
        updater.update(checkpoint_of(which="b"))
    assert stall.reached
    assert "agent 1 died" in str(caught.value)
    assert server.live_digests() != before
    assert server.status()["state"] == "poisoned"
    assert refused(server)
    assert_mended(updater, server, checkpoint_of, answer_of)
    assert server.live_digests() == before


def test_a_poisoned_engine_stays_so_when_the_next_update_touches_nothing(
    server, checkpoint_of, updater_of, stall, kill, answer_of
):
    """The second update does no harm, and none of the first one's is undone by that."""
    before = server.live_digests()
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[1])
    with aborts(Outcome.POISONED, PeerLost, SOON_S):
        updater.update(checkpoint_of(which="b"))
    mixed = server.live_digests()
    stall.start_sending = lambda _group, *, timeout_s: kill(updater.agent_pids[0])
    with aborts(Outcome.POISONED, PeerLost, SOON_S):
        updater.update(checkpoint_of(which="b"))
    assert server.live_digests() == mixed
    assert refused(server)
    stall.start_sending = stall.original
    assert_mended(updater, server, checkpoint_of, answer_of)
    assert server.live_digests() == before


def test_stopping_a_busy_agent_leaves_the_updater_whole(server, checkpoint_of, updater_of, kill):
    """An agent whose pipe closes while it works is stopped, not orphaned: what its living parent needs stays."""
    updater = updater_of(server)
    updater.update(checkpoint_of(which="a"))
    os.kill(updater.agent_pids[0], signal.SIGSTOP)  # reads no Stop: only the end of its pipe, later
    group, sockets = updater._agents, updater._sockets
    stopped = group.pids[0]
    threading.Timer(0.3, lambda: os.kill(stopped, signal.SIGCONT)).start()
    group.stop()
    assert sockets.is_dir()
    assert updater._memory.is_dir()
    assert updater.update(checkpoint_of(which="a"), version="whole").outcome is Outcome.COMMITTED


def test_an_agent_is_stopped_past_the_deadline(server, checkpoint_of, updater_of, stall, answer_of):
    before = server.live_digests()
    updater = updater_of(server, on_progress=stall.on_progress, transfer_timeout_s=2.0, commit_timeout_s=3.0)
    stall.at_middle = lambda: os.kill(updater.agent_pids[1], signal.SIGSTOP)
    with aborts(Outcome.POISONED, TransferTimeout, 2.0 + 2 * 3.0 + SOON_S):
        updater.update(checkpoint_of(which="b"))
    assert server.status()["state"] == "poisoned"
    assert_mended(updater, server, checkpoint_of, answer_of)
    assert server.live_digests() == before


def test_an_agent_is_killed_before_anything_was_loaded(server, checkpoint_of, updater_of, stall, kill, answer_of):
    """Every rank agreed and began, no byte arrived: nothing was touched, and the engine serves on."""
    before, said = server.live_digests(), answer_of(server)
    updater = updater_of(server)
    stall.start_sending = lambda _group, *, timeout_s: kill(updater.agent_pids[0])
    with aborts(Outcome.CLEAN, PeerLost, SOON_S):
        updater.update(checkpoint_of(which="b"))
    assert server.status()["state"] == "serving"
    assert server.live_digests() == before
    assert answer_of(server) == said


def test_an_agent_dies_between_two_updates(server, checkpoint_of, updater_of, kill, answer_of):
    updater = updater_of(server)
    updater.update(checkpoint_of(which="b"))
    kill(updater.agent_pids[0])
    assert_mended(updater, server, checkpoint_of, answer_of)


def test_an_agent_that_dies_at_the_commit_changes_nothing(server, checkpoint_of, updater_of, kill, monkeypatch):
    """Every rank has verified: nobody needs the agents any more, and what the ranks commit is committed."""
    updater, gather = updater_of(server), Conversation.gather

    def gather_after_a_death(talk, wanted, **options):
        if wire.Committed in wanted.values():
            kill(updater.agent_pids[0])
        return gather(talk, wanted, **options)

    monkeypatch.setattr(Conversation, "gather", gather_after_a_death)
    report = updater.update(checkpoint_of(which="a"), version="committed")
    assert report.outcome is Outcome.COMMITTED
    assert (server.status()["state"], server.status()["version"]) == ("serving", "committed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_in_the_middle(checkpoint_of, updater_of, stall, kill, eventually, rank):
    with ReferenceServer(checkpoint_of(which="a"), tp=2) as server:
        updater = updater_of(server, on_progress=stall.on_progress)
        stall.at_middle = lambda: kill(server.rank_pids[rank])
        with aborts(Outcome.POISONED, PeerLost, SOON_S) as caught:
            updater.update(checkpoint_of(which="b"))
        assert f"rank {rank} of reference at {server.url} died" in str(caught.value)
        eventually(lambda: server.status()["state"] in ("dead", "poisoned"), "the server knows")
        assert refused(server)


def test_one_engine_of_two_dies_and_the_other_can_be_mended(server, checkpoint_of, updater_of, stall, kill, answer_of):
    before = server.live_digests()
    with ReferenceServer(checkpoint_of(which="a")) as doomed:
        updater = updater_of(server, doomed, on_progress=stall.on_progress)
        stall.at_middle = lambda: kill(doomed.rank_pids[0])
        with aborts(Outcome.POISONED, PeerLost, SOON_S) as caught:
            updater.update(checkpoint_of(which="b"))
        assert caught.value.by_endpoint == {server.url: Outcome.POISONED, doomed.url: Outcome.POISONED}
    other = updater_of(server)
    assert_mended(other, server, checkpoint_of, answer_of)
    assert server.live_digests() == before


CONTROLLER = """
import os, signal, sys
from ckpt_core import Target, UpdateConfig, Updater
from ckpt_core.agents import AgentGroup
from ckpt_core.metrics import Stage
from ckpt_core.wire import Send

def half(group, *, timeout_s, trace):
    group._conversation.tell(group.peers[0], Send(timeout_s=timeout_s))

def end(stage, done, total):
    if stage is Stage.TRANSFER and done > 0:
        print(*updater.agent_pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

AgentGroup.start_sending = half
config = UpdateConfig(ring_bytes=1 << 16, bucket_bytes=1 << 14, silence_timeout_s=1.0)
with Updater([Target(engine="reference", url=sys.argv[1])], config=config, on_progress=end) as updater:
    updater.update(sys.argv[2])
"""


def test_the_controller_is_killed_in_the_middle(server, checkpoint_of, updater_of, eventually, answer_of):
    """The ranks abort by themselves when they hear nothing; the agents go with their parent and leave no memory."""
    before = server.live_digests()
    done = subprocess.run(
        [sys.executable, "-c", CONTROLLER, server.url, str(checkpoint_of(which="b"))],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.split()):
        eventually(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"agent {pid} is gone")
    eventually(lambda: server.status()["state"] == "poisoned", "the ranks gave up", timeout_s=SOON_S)
    assert refused(server)
    updater = updater_of(server)
    assert_mended(updater, server, checkpoint_of, answer_of)
    assert server.live_digests() == before


# -- an engine in this process: faults at an exact bucket --------------------------------------------------------
class Eventful(Worker):
    """Calls `at_bucket` before it loads its third bucket."""

    def __init__(self, model_dir):
        super().__init__(model_dir)
        self.buckets = 0
        self.at_bucket = lambda: None

    def load(self, update, tensors):
        self.buckets += 1
        if self.buckets == 3:
            self.at_bucket()
        return super().load(update, tensors)


def test_a_load_that_raises_poisons_and_is_mended(checkpoint_of, updater_of):
    worker, updater = Eventful(checkpoint_of(which="a")), None

    def fail():
        raise RuntimeError("no kernel for this")

    worker.at_bucket = fail
    updater = updater_of(worker)
    with pytest.raises(UpdateAborted, match="RuntimeError: no kernel for this") as caught:
        updater.update(checkpoint_of(which="b"))
    assert caught.value.outcome is Outcome.POISONED
    assert "no kernel for this" in caught.value.causes[0].remote_traceback
    report = updater.update(checkpoint_of(which="b"))
    assert report.ranks[0].fingerprint == fingerprint(Worker(checkpoint_of(which="b")).live())
    assert len(worker.generate([5, 17], 3)) == 3


@pytest.mark.parametrize(("where", "step"), [(Fleet, "pause"), (Fleet, "attach"), (Agreement, "ask_layouts")])
def test_a_poisoned_engine_stays_so_however_early_the_next_update_fails(
    checkpoint_of, updater_of, monkeypatch, where, step
):
    worker = Eventful(checkpoint_of(which="a"))
    worker.at_bucket = raises(RuntimeError("no kernel for this"))
    updater = updater_of(worker)
    with pytest.raises(UpdateAborted):
        updater.update(checkpoint_of(which="b"))
    with monkeypatch.context() as patch, aborts(Outcome.POISONED, EngineStateError, SOON_S):
        patch.setattr(where, step, raises(EngineStateError("not now")))
        updater.update(checkpoint_of(which="b"))
    assert worker.state is EndpointState.POISONED
    assert updater.update(checkpoint_of(which="b")).outcome is Outcome.COMMITTED


def test_mixed_weights_are_not_mended_by_a_part_of_a_checkpoint(checkpoint_of, updater_of, tensors_of):
    worker = Eventful(checkpoint_of(which="a"))
    worker.at_bucket = raises(RuntimeError("no kernel for this"))
    updater = updater_of(worker, allow_missing=True)
    with pytest.raises(UpdateAborted):
        updater.update(checkpoint_of(which="b"))
    part = tensors_of(checkpoint_of(which="b"))
    del part["model.norm.weight"]
    with aborts(Outcome.POISONED, EngineStateError, SOON_S) as caught:
        updater.update(part)
    assert "model.norm.weight" in str(caught.value)
    assert worker.state is EndpointState.POISONED
    assert updater.update(checkpoint_of(which="b")).outcome is Outcome.COMMITTED
    assert updater.update(part).outcome is Outcome.COMMITTED  # on whole weights a part may come


def test_an_agent_dies_at_an_exact_bucket(checkpoint_of, updater_of, kill):
    worker = Eventful(checkpoint_of(which="a"))
    updater = updater_of(worker, ring_bytes=1 << 14)
    worker.at_bucket = lambda: kill(updater.agent_pids[0])
    with aborts(Outcome.POISONED, PeerLost, SOON_S):
        updater.update(checkpoint_of(which="b"))
    report = updater.update(checkpoint_of(which="a"))
    assert report.ranks[0].fingerprint == fingerprint(Worker(checkpoint_of(which="a")).live())


def test_bytes_changed_in_the_ring_are_caught(checkpoint_of, updater_of, roots, eventually):
    """Whatever writes into the shared memory of the ring: the digest of what arrives tells."""
    worker = Eventful(checkpoint_of(which="a"))

    def published():
        (control,) = roots[0].rglob("control-0-*")
        return int.from_bytes(control.read_bytes()[64:72], sys.byteorder)

    def scribble():
        eventually(lambda: published() >= 4, "the next bucket is in the ring")
        (ring,) = roots[0].rglob("ring-0-*")
        with ring.open("r+b") as file:
            for offset in range(0, 1 << 16, 512):
                file.seek(offset)
                file.write(b"\xff" * 64)

    worker.at_bucket = scribble
    with pytest.raises(UpdateAborted) as caught:
        updater_of(worker).update(checkpoint_of(which="b"))
    assert isinstance(caught.value.causes[0], VerificationError)
    assert caught.value.outcome is Outcome.POISONED


def test_a_file_cut_in_the_middle_ends_with_a_typed_outcome(checkpoint_of, updater_of, tmp_path):
    source = checkpoint_of(which="b") / "model.safetensors"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(source.read_bytes())
    worker = Eventful(checkpoint_of(which="a"))
    updater = updater_of(worker, ring_bytes=1 << 14)
    worker.at_bucket = lambda: os.truncate(copy, 4096)
    with pytest.raises(UpdateAborted) as caught:
        updater.update(copy)
    assert caught.value.outcome is Outcome.POISONED
    updater.update(checkpoint_of(which="a"))


def test_an_interrupt_by_the_user_undoes_the_update(checkpoint_of, updater_of, server, stall):
    before = server.live_digests()
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(UpdateAborted) as caught:
        updater.update(checkpoint_of(which="b"))
    assert isinstance(caught.value.causes[0], KeyboardInterrupt)
    assert caught.value.outcome is Outcome.POISONED
    updater.update(checkpoint_of(which="a"))
    assert server.live_digests() == before
