"""Failures in the middle of an update: the server lives, gives old tokens or none, and the next update repairs it."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from cases import CASES
from safetensors.torch import load_file

from ckpt_core import Outcome, Undo, UpdateAborted
from ckpt_core.contract import EndpointState
from ckpt_core.errors import CoverageError, PeerLost, TransferTimeout
from ckpt_core.fleet import Fleet

DEAD_AFTER_S = 30.0  # far below the deadlines of a transfer: a death is seen, not waited for
BOTH_SIZES = pytest.mark.parametrize("case", [case for case in CASES if case.model in ("llama", "qwen3_moe")], ids=str)
TWO_RANKS = pytest.mark.parametrize("case", [case for case in CASES if case.model == "llama" and case.tp == 2], ids=str)


@pytest.fixture
def server(deployment, updater_of):
    """Serves checkpoint A, whatever the test before left."""
    updater_of(deployment).update(deployment.checkpoints.a, version="A")
    return deployment


def assert_next_update_repairs(server, updater):
    """The same updater brings B, then A; nothing of the failure is left."""
    for which in "ba":
        assert updater.update(server.checkpoints[which], version=f"mended {which}").outcome is Outcome.COMMITTED
        assert server.says() == server.fresh.short(which)
    assert server.status().state is EndpointState.SERVING
    assert server.status().version == "mended a"


@contextmanager
def fails(kind=UpdateAborted):
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        yield caught
    assert time.monotonic() - start < DEAD_AFTER_S


@TWO_RANKS
def test_an_agent_is_killed_in_the_middle(server, updater_of, stall, kill):
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[-1])
    with fails() as caught:
        updater.update(server.checkpoints.b, version="B")
    assert stall.reached
    assert caught.value.outcome is Outcome.RESTORED
    assert isinstance(caught.value.causes[0], PeerLost)
    server.assert_old_tokens_or_none(caught.value.outcome, "a")
    assert_next_update_repairs(server, updater)


@TWO_RANKS
def test_an_agent_is_killed_and_nothing_is_undone(server, updater_of, stall, kill):
    updater = updater_of(server, undo=Undo.NONE, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[-1])
    with fails() as caught:
        updater.update(server.checkpoints.b, version="B")
    assert caught.value.outcome is Outcome.POISONED
    server.assert_gives_no_token()
    assert_next_update_repairs(server, updater)


@TWO_RANKS
def test_an_agent_is_stopped_past_the_deadline(server, updater_of, stall):
    updater = updater_of(server, transfer_timeout_s=3.0, commit_timeout_s=5.0, on_progress=stall.on_progress)
    stall.at_middle = lambda: os.kill(updater.agent_pids[-1], signal.SIGSTOP)
    with fails() as caught:
        updater.update(server.checkpoints.b, version="B")
    assert isinstance(caught.value.causes[0], TransferTimeout)
    server.assert_old_tokens_or_none(caught.value.outcome, "a")
    assert_next_update_repairs(server, updater_of(server))


@TWO_RANKS
def test_the_user_interrupts_in_the_middle(server, updater_of, stall):
    updater = updater_of(server, on_progress=stall.on_progress)
    stall.at_middle = lambda: signal.raise_signal(signal.SIGINT)
    with fails() as caught:
        updater.update(server.checkpoints.b, version="B")
    assert isinstance(caught.value.causes[0], KeyboardInterrupt)
    assert caught.value.outcome is Outcome.RESTORED
    server.assert_old_tokens_or_none(caught.value.outcome, "a")
    assert_next_update_repairs(server, updater)


@BOTH_SIZES
def test_a_tensor_of_the_wrong_shape(server, updater_of):
    """What the plugin's layout does not catch, the engine's loader does, in the middle."""
    tensors = load_file(server.checkpoints.b / "model.safetensors")
    name = max(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name][:-2].contiguous()
    updater = updater_of(server)
    with fails((UpdateAborted, CoverageError)) as caught:
        updater.update(tensors, version="broken")
    server.assert_old_tokens_or_none(getattr(caught.value, "outcome", Outcome.CLEAN), "a")
    assert_next_update_repairs(server, updater)


@BOTH_SIZES
def test_a_tensor_is_missing(server, updater_of):
    tensors = load_file(server.checkpoints.b / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    updater = updater_of(server)
    with fails((UpdateAborted, CoverageError)) as caught:
        updater.update(tensors, version="incomplete")
    server.assert_old_tokens_or_none(getattr(caught.value, "outcome", Outcome.CLEAN), "a")
    assert_next_update_repairs(server, updater)


@BOTH_SIZES
def test_the_file_is_cut_while_the_engine_is_paused(server, updater_of, tmp_path, monkeypatch):
    """The source breaks after its header was read and its bytes were digested."""
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((server.checkpoints.b / "model.safetensors").read_bytes())
    pause = Fleet.pause

    def pause_and_cut(fleet, mode):
        os.truncate(copy, copy.stat().st_size // 2)
        return pause(fleet, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "pause", pause_and_cut)
        with fails() as caught:
            updater_of(server, ring_bytes=1 << 14, bucket_bytes=1 << 13).update(copy, version="cut")
    server.assert_old_tokens_or_none(caught.value.outcome, "a")
    assert_next_update_repairs(server, updater_of(server))


CONTROLLER = """
import os, signal, sys
from ckpt_core import Target, UpdateConfig, Updater
from ckpt_core.agents import AgentGroup
from ckpt_core.contract import PauseMode
from ckpt_core.metrics import Stage
from ckpt_core.wire import Send

held, whole = False, AgentGroup.start_sending

def half(group, *, timeout_s, **options):
    if held:
        whole(group, timeout_s=timeout_s, **options)
    else:
        group._conversation.tell(group.peers[0], Send(timeout_s=timeout_s))

def end(stage, done, total):
    global held
    if stage is Stage.TRANSFER and done > 0 and not held:
        held = True
        print("in the middle", flush=True)
        os.kill(os.getpid(), int(sys.argv[4]))

AgentGroup.start_sending = half
config = UpdateConfig(ring_bytes=1 << 18, bucket_bytes=1 << 16, silence_timeout_s=1.0, pause_mode=PauseMode.ABORT)
with Updater([Target(engine=sys.argv[1], url=sys.argv[2])], config=config, on_progress=end) as updater:
    updater.update(sys.argv[3])
"""


def wait_until_ranks_give_up(server):
    until = time.monotonic() + DEAD_AFTER_S
    while server.status().state is EndpointState.UPDATING:
        assert time.monotonic() < until, "the ranks did not give up"
        threading.Event().wait(0.1)
    server.assert_gives_no_token()


@TWO_RANKS
def test_the_controller_is_killed_in_the_middle(server, updater_of):
    """The ranks hear nothing and abort by themselves; the next controller undoes what this one left."""
    arguments = [server.engine, server.url, str(server.checkpoints.b), str(int(signal.SIGKILL))]
    done = subprocess.run([sys.executable, "-c", CONTROLLER, *arguments], timeout=90, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until_ranks_give_up(server)
    updater = updater_of(server)
    assert updater.recover() == {server.url: Outcome.RESTORED}
    server.assert_old_tokens_or_none(Outcome.RESTORED, "a")
    assert_next_update_repairs(server, updater)


@TWO_RANKS
def test_the_controller_is_stopped_past_the_silence(server, updater_of):
    """It wakes up when the ranks have given up, and undoes its own update."""
    arguments = [server.engine, server.url, str(server.checkpoints.b), str(int(signal.SIGSTOP))]
    with subprocess.Popen([sys.executable, "-c", CONTROLLER, *arguments], stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout.readline()
        wait_until_ranks_give_up(server)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(60) != 0
    assert server.status().state in (EndpointState.SERVING, EndpointState.POISONED)
    server.assert_old_tokens_or_none(
        Outcome.RESTORED if server.status().state is EndpointState.SERVING else Outcome.POISONED, "a"
    )
    assert_next_update_repairs(server, updater_of(server))
