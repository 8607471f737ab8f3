"""A failed update is undone: by the version before, where it is warm, or by a snapshot; and versions are gone back to."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import signal
import subprocess
import sys

import pytest

from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_conformance.reference.worker import Worker
from ckpt_core import Outcome, Undo, UpdateAborted
from ckpt_core.contract import EndpointState
from ckpt_core.errors import ConfigError, EngineStateError, PeerLost
from ckpt_core.fleet import Fleet
from ckpt_core.verify import fingerprint


@pytest.fixture
def updater_of(updater_of):
    """One that goes back where it can."""
    return lambda *engines, **options: updater_of(*engines, **{"undo": Undo.REPLAY, **options})


@pytest.fixture(scope="module")
def shared_server(start_server, checkpoint_of):
    return start_server(checkpoint_of(which="a"), tp=2)


@pytest.fixture
def server(shared_server, checkpoint_of, updater_of):
    """Runs checkpoint A, which is known and warm."""
    updater_of(shared_server).update(checkpoint_of(which="a"), version="A")
    return shared_server


class Failing(Worker):
    """Fails at its second bucket, when told to."""

    def __init__(self, model_dir):
        super().__init__(model_dir)
        self.buckets, self.fails = 0, False

    def load(self, update, tensors):
        self.buckets += 1
        if self.fails and self.buckets % 3 == 2:
            self.fails = False
            raise RuntimeError("no kernel for this")
        return super().load(update, tensors)


def test_a_killed_agent_is_undone_by_the_version_before(server, checkpoint_of, updater_of, stall, kill, answer_of):
    before, said = server.live_digests(), answer_of(server)
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[1])
    with pytest.raises(UpdateAborted) as caught:
        updater.update(checkpoint_of(which="b"), version="B")
    assert isinstance(caught.value.causes[0], PeerLost)
    assert caught.value.outcome is Outcome.RESTORED
    assert caught.value.by_endpoint == {server.url: Outcome.RESTORED}
    assert "the old weights are back, verified" in str(caught.value)
    assert server.live_digests() == before
    assert answer_of(server) == said
    assert (server.status()["state"], server.status()["version"]) == ("serving", "A")
    assert updater.history.store.updates(1)[0].outcomes == {server.url: Outcome.RESTORED}
    assert updater.update(checkpoint_of(which="b"), version="B").outcome is Outcome.COMMITTED


def test_without_a_warm_version_it_stays_poisoned(server, checkpoint_of, updater_of, stall, kill):
    updater = updater_of(server, undo=Undo.NONE, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[1])
    with pytest.raises(UpdateAborted) as caught:
        updater.update(checkpoint_of(which="b"), version="B")
    assert caught.value.outcome is Outcome.POISONED
    assert server.status()["state"] == "poisoned"


def test_the_survivor_of_two_goes_back(server, checkpoint_of, updater_of, stall, kill):
    before = server.live_digests()
    with ReferenceServer(checkpoint_of(which="a")) as doomed:
        stall.start_sending = stall.original
        updater_of(server, doomed).update(checkpoint_of(which="a"), version="A")
        updater = updater_of(server, doomed, on_progress=stall.on_progress)
        stall.start_sending = stall.hold_last
        stall.at_middle = lambda: kill(doomed.rank_pids[0])
        with pytest.raises(UpdateAborted) as caught:
            updater.update(checkpoint_of(which="b"), version="B")
        assert caught.value.by_endpoint == {server.url: Outcome.RESTORED, doomed.url: Outcome.POISONED}
        assert caught.value.outcome is Outcome.POISONED
        assert server.live_digests() == before
        assert server.status()["state"] == "serving"


def test_a_rank_goes_back_to_its_snapshot(checkpoint_of, updater_of):
    worker = Failing(checkpoint_of(which="a"))
    fresh = fingerprint(worker.live())
    updater = updater_of(worker, undo=Undo.SNAPSHOT)
    worker.fails = True
    with pytest.raises(UpdateAborted) as caught:
        updater.update(checkpoint_of(which="b"))
    assert caught.value.outcome is Outcome.RESTORED
    assert fingerprint(worker.live()) == fresh
    assert worker.state is EndpointState.SERVING
    assert len(worker.generate([5, 17], 3)) == 3
    assert updater.update(checkpoint_of(which="b")).outcome is Outcome.COMMITTED


def test_named_tensors_are_gone_back_to(checkpoint_of, updater_of, tensors_of):
    """The tensors of the version before are still in the host pool; those of the failed one are beside them."""
    worker = Failing(checkpoint_of(which="b"))
    updater = updater_of(worker)
    updater.update(tensors_of(checkpoint_of(which="a")), version="step 1")
    fresh = fingerprint(worker.live())
    worker.fails, worker.buckets = True, 0
    updater._config = updater._config.__class__(**{**_fields(updater._config), "replay": False})
    with pytest.raises(UpdateAborted) as caught:
        updater.update(tensors_of(checkpoint_of(which="b")), version="step 2")
    assert caught.value.outcome is Outcome.RESTORED
    assert fingerprint(worker.live()) == fresh
    assert worker.version == "step 1"


def _fields(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_rollback_takes_the_version_before_and_any_warm_one(server, checkpoint_of, updater_of, tmp_path):
    updater = updater_of(server)
    before = server.live_digests()
    updater.update(checkpoint_of(which="b"), version="B")
    assert updater.rollback().version == "A"
    assert server.live_digests() == before
    assert updater.rollback("B").version == "B"
    with pytest.raises(ConfigError, match="C"):
        updater.rollback("C")


def test_a_label_is_bound_to_its_content(server, checkpoint_of, updater_of):
    before = server.live_digests()
    with pytest.raises(ConfigError, match="label 'A'"):
        updater_of(server).update(checkpoint_of(which="b"), version="A")
    assert server.live_digests() == before
    assert server.status()["state"] == "serving"


def test_an_engine_restarted_in_the_middle_is_not_resumed(checkpoint_of, updater_of, monkeypatch):
    """Its address is the same and its instance is not: it has the weights that it started with."""
    worker = Worker(checkpoint_of(which="a"))
    updater, flush = updater_of(worker), Fleet.flush

    def restarted(fleet, **options):
        worker.instance_id = "another life"
        return flush(fleet, **options)

    monkeypatch.setattr(Fleet, "flush", restarted)
    with pytest.raises(EngineStateError, match="restarted during the update"):
        updater.update(checkpoint_of(which="b"))
    assert worker.state is EndpointState.PAUSED
    monkeypatch.undo()
    assert updater.update(checkpoint_of(which="b")).outcome is Outcome.COMMITTED


# -- a controller that dies ---------------------------------------------------------------------------------------
CONTROLLER = """
import os, signal, sys
from ckpt_core import Target, UpdateConfig, Updater
from ckpt_core.session import Session
from ckpt_core.states import SessionState

move, state = Session._move, SessionState(sys.argv[3])

def end(session, to):
    move(session, to)
    if to is state:
        os.kill(os.getpid(), signal.SIGKILL)

Session._move = end
config = UpdateConfig(ring_bytes=1 << 16, bucket_bytes=1 << 14, silence_timeout_s=1.0)
with Updater([Target(engine="reference", url=sys.argv[1])], config=config) as updater:
    updater.update(sys.argv[2], version="B")
"""


@pytest.mark.parametrize("state", ["planned", "paused", "attached", "loading", "verifying", "committed"])
def test_what_a_killed_controller_left_is_recovered(server, checkpoint_of, updater_of, eventually, state):
    before = server.live_digests()
    done = subprocess.run(
        [sys.executable, "-c", CONTROLLER, server.url, str(checkpoint_of(which="b")), state], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    eventually(lambda: server.status()["state"] != "updating", "the ranks gave up", timeout_s=20)
    updater = updater_of(server)
    (left,) = updater.history.left_behind()
    assert left.version == "B"
    found = updater.recover()
    assert updater.history.left_behind() == ()
    assert server.status()["state"] == "serving"
    if state in ("verifying", "committed"):
        assert found == {server.url: Outcome.COMMITTED}  # every rank had verified: it is finished
        assert server.status()["version"] == "B"
        updater.rollback()
    else:
        assert found[server.url] in (Outcome.CLEAN, Outcome.RESTORED)
    assert server.live_digests() == before
    assert updater.update(checkpoint_of(which="b"), version="B").outcome is Outcome.COMMITTED


def test_nothing_is_recovered_where_nothing_was_left(server, updater_of):
    assert updater_of(server).recover() == {}
