"""Looks at live engines: what they hold is compared with a version, and nothing of it changes."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import json
import subprocess
import sys

import pytest
import torch

from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_conformance.reference.options import WorkerOptions
from ckpt_conformance.reference.worker import Worker
from ckpt_core import Outcome, Undo, UpdateAborted
from ckpt_core.contract import EndpointState
from ckpt_core.errors import ConfigError, CoverageError, EngineStateError, PeerLost, VerificationError
from ckpt_core.inspection import Inspection

CKPT = [sys.executable, "-c", "from ckpt_core.cli import main; main()"]


def ckpt(*arguments, code=0):
    done = subprocess.run([*CKPT, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Nobody remembers anything from other tests."""
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def server(start_server, checkpoint_of):
    """Whatever it runs at the end of a test, the next one begins with A; nobody told anybody."""
    return start_server(checkpoint_of(which="a"), tp=2)


@pytest.fixture
def fresh(server, checkpoint_of, updater_of, monkeypatch, tmp_path):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("CKPT_STATE_DIR", str(tmp_path / "elsewhere"))
        updater = updater_of(server)
        updater.update(checkpoint_of(which="a"), version="A")
    return server


def flip(tensor):
    """One bit of its first element."""
    tensor.data.view(-1)[:1].view(torch.uint8)[0] ^= 1


def test_an_adopted_engine_can_be_undone(start_server, checkpoint_of, updater_of, stall, kill, answer_of, caplog):
    server = start_server(checkpoint_of(which="a"), tp=2)
    before, said = server.live_digests(), answer_of(server)
    updater = updater_of(server, undo=Undo.REPLAY, on_progress=stall.on_progress)
    (look,) = updater.adopt(checkpoint_of(which="a"), version="A").engines
    assert look.equal
    assert (look.unchecked, look.unchecked_bytes, look.checked_share) == ((), 0, 1.0)
    assert look.equal_bytes > 0
    assert len(look.fingerprints) == 2
    assert server.live_digests() == before
    assert answer_of(server) == said
    assert server.status()["state"] == "serving"
    assert updater.history.ran(server.url, server.instance_id).version == "A"
    stall.at_middle = lambda: kill(updater.agent_pids[1])
    with pytest.raises(UpdateAborted) as caught:
        updater.update(checkpoint_of(which="b"), version="B")
    assert caught.value.outcome is Outcome.RESTORED
    assert "cannot be undone" not in caplog.text
    assert server.live_digests() == before
    assert answer_of(server) == said
    assert updater.update(checkpoint_of(which="b"), version="B").outcome is Outcome.COMMITTED
    assert updater.rollback().version == "A"  # an adopted version is one to go back to
    assert server.live_digests() == before


def test_what_an_engine_does_not_run_is_not_adopted(fresh, checkpoint_of, updater_of):
    before, updater = fresh.live_digests(), updater_of(fresh)
    with pytest.raises(VerificationError, match="got other bytes in"):
        updater.adopt(checkpoint_of(which="b"), version="B")
    assert updater.history.store.engines() == ()
    assert updater.history.pool.versions() == ()
    assert updater.history.store.updates(9) == ()
    assert fresh.live_digests() == before
    assert fresh.status()["state"] == "serving"


def test_verify_after_updates(fresh, checkpoint_of, updater_of):
    updater = updater_of(fresh)
    with pytest.raises(ConfigError, match="ckpt adopt"):
        updater.verify()
    updater.update(checkpoint_of(which="a"), version="A")
    updater.update(checkpoint_of(which="b"), version="B")
    known = updater.update(checkpoint_of(which="b"), version="B")
    report = updater.verify()
    assert report.equal
    assert (report.engines[0].version, report.engines[0].as_committed) == ("B", True)
    assert report.engines[0].checked_share == 1.0
    other = updater.verify("A")
    assert not other.equal
    assert other.engines[0].differing_count > 0
    assert fresh.status()["state"] == "serving"
    again = updater.update(checkpoint_of(which="a"), version="A")  # by the plan and the replay of last time
    assert "layout" not in again.stages
    assert [rank.stats.replayed_bytes for rank in again.ranks] == [rank.stats.replayed_bytes for rank in known.ranks]


def test_a_paused_engine_stays_paused(checkpoint_of, updater_of):
    worker = Worker(checkpoint_of(which="a"))
    worker.pause()
    updater_of(worker).adopt(checkpoint_of(which="a"))
    assert worker.state is EndpointState.PAUSED


def test_a_flipped_bit_is_found_by_name(checkpoint_of, updater_of):
    worker = Worker(checkpoint_of(which="a"))
    updater = updater_of(worker)
    updater.adopt(checkpoint_of(which="a"), version="A")
    assert updater.verify().equal
    flip(dict(worker.model.named_parameters())["model.layers.0.self_attn.o_proj.weight"])
    (look,) = updater.verify("A").engines
    assert (look.differing, look.differing_count) == (("model.layers.0.self_attn.o_proj.weight",), 1)
    assert look.as_committed is False
    assert not look.equal
    assert worker.state is EndpointState.SERVING


@pytest.mark.parametrize(("arch", "tied"), [("qwen3_moe", False), ("llama", True)])
def test_every_architecture_can_be_compared(checkpoint_of, updater_of, arch, tied):
    worker = Worker(checkpoint_of(arch, tied=tied, which="a"))
    (look,) = updater_of(worker).adopt(checkpoint_of(arch, tied=tied, which="a")).engines
    assert look.checked_share == 1.0
    with pytest.raises(VerificationError):
        updater_of(worker).adopt(checkpoint_of(arch, tied=tied, which="b"))


def test_quantised_modules_are_not_comparable_and_told(checkpoint_of, updater_of, caplog):
    worker = Worker(checkpoint_of(which="a"), WorkerOptions(quantise=True))
    updater = updater_of(worker)
    (look,) = updater.adopt(checkpoint_of(which="a"), version="A").engines
    assert look.equal
    assert 0 < look.checked_share < 1
    assert any("proj" in name for name in look.unchecked)
    assert not any("norm" in name for name in look.unchecked)
    assert "could not be compared" in caplog.text
    report = updater.verify()
    assert report.equal
    quantised = next(
        live.tensor for name, live in worker.live().items() if "proj" in name and not live.tensor.is_floating_point()
    )
    flip(quantised)
    (look,) = updater.verify().engines  # digests cannot see it, the fingerprint does
    assert (look.differing_count, look.as_committed, look.equal) == (0, False, False)


def test_a_cold_version_is_told_by_fingerprints(checkpoint_of, updater_of, tensors_of, tmp_path):
    worker = Worker(checkpoint_of(which="a"))
    files = tmp_path / "model"
    files.mkdir()
    for path in checkpoint_of(which="b").iterdir():
        (files / path.name).write_bytes(path.read_bytes())
    updater = updater_of(worker)
    updater.update(files, version="B")
    for path in files.glob("*.safetensors"):
        path.unlink()
    (look,) = updater.verify().engines
    assert (look.equal_bytes, look.as_committed, look.equal) == (0, True, True)
    assert look.notes
    flip(dict(worker.model.named_parameters())["model.norm.weight"])
    assert not updater.verify().equal


class Deaf(Worker):
    """Its loader cannot be recorded."""

    def recording_target(self):
        return None


def test_an_engine_that_cannot_be_recorded(checkpoint_of, updater_of):
    worker = Deaf(checkpoint_of(which="a"))
    updater = updater_of(worker)
    with pytest.raises(VerificationError, match=r"nothing of version A could be compared .*record"):
        updater.adopt(checkpoint_of(which="a"), version="A")
    assert updater.history.store.engines() == ()
    updater.update(checkpoint_of(which="b"), version="B")
    (look,) = updater.verify().engines
    assert (look.equal_bytes, look.as_committed, look.equal) == (0, True, True)
    assert worker.state is EndpointState.SERVING


def test_a_checkpoint_that_lacks_something_is_not_adopted(checkpoint_of, updater_of, tensors_of):
    worker = Worker(checkpoint_of(which="a"))
    tensors = tensors_of(checkpoint_of(which="a"))
    del tensors["model.norm.weight"]
    updater = updater_of(worker)
    with pytest.raises(CoverageError, match=r"model\.norm\.weight"):
        updater.adopt(tensors)
    assert updater.history.store.engines() == ()


def test_a_poisoned_engine_is_not_looked_at(checkpoint_of, updater_of):
    worker = Worker(checkpoint_of(which="a"))
    worker.set_poison("mixed")
    with pytest.raises(EngineStateError, match="poisoned"):
        updater_of(worker).adopt(checkpoint_of(which="a"))


def test_what_a_dead_controller_left_comes_first(checkpoint_of, updater_of, monkeypatch):
    worker = Worker(checkpoint_of(which="a"))
    updater = updater_of(worker)
    updater.update(checkpoint_of(which="a"), version="A")
    monkeypatch.setattr(updater.history, "left_behind", lambda: updater.history.store.updates(1))
    with pytest.raises(EngineStateError, match="ckpt recover"):
        updater.adopt(checkpoint_of(which="a"), version="A")


def test_a_rank_that_dies_during_a_look(checkpoint_of, updater_of, kill, monkeypatch, start_server):
    digests = Inspection._digests
    with ReferenceServer(checkpoint_of(which="a"), tp=2) as doomed, ReferenceServer(checkpoint_of(which="a")) as other:
        before = other.live_digests()

        def killing(inspection, manifest):
            kill(doomed.rank_pids[1])
            return digests(inspection, manifest)

        monkeypatch.setattr(Inspection, "_digests", killing)
        updater = updater_of(doomed, other)
        with pytest.raises(PeerLost, match="the look wrote nothing") as caught:
            updater.adopt(checkpoint_of(which="a"))
        assert f"{other.url} is serving" in str(caught.value)
        assert f"{doomed.url} is" in str(caught.value)
        assert f"{doomed.url} is serving" not in str(caught.value)
        assert other.live_digests() == before
        assert updater.history.store.engines() == ()


def test_a_killed_agent_ends_a_look_and_the_engine_serves(fresh, checkpoint_of, updater_of, kill, monkeypatch):
    updater, digests = updater_of(fresh), Inspection._digests

    def killing(inspection, manifest):
        monkeypatch.undo()
        kill(updater.agent_pids[0])
        return digests(inspection, manifest)

    monkeypatch.setattr(Inspection, "_digests", killing)
    with pytest.raises(PeerLost, match=f"{fresh.url} is serving"):
        updater.adopt(checkpoint_of(which="a"))
    assert updater.adopt(checkpoint_of(which="a")).equal


def test_the_command_line_tells_by_its_exit_code(fresh, checkpoint_of, tmp_path):
    engine = f"reference={fresh.url}"
    ckpt("adopt", checkpoint_of(which="b"), "--endpoint", engine, code=8)
    done = ckpt("adopt", checkpoint_of(which="a"), "--endpoint", engine, "--version", "A", "--copy-to-pool")
    assert "equal" in done.stdout
    ckpt("verify", "--endpoint", engine, "--json", tmp_path / "look.json")
    found = json.loads((tmp_path / "look.json").read_bytes())
    assert (found["equal"], found["engines"][0]["checked_share"]) == (True, 1.0)
    done = ckpt("update", checkpoint_of(which="b"), "--endpoint", engine, "--version", "B")
    assert "cannot be undone" not in done.stderr
    done = ckpt("verify", "--endpoint", engine, "--version", "A", code=8)
    assert "differs" in done.stdout
    ckpt("verify", "--endpoint", engine, "--version", "B")
    ckpt("verify", "--endpoint", engine, "--version", "C", code=2)
