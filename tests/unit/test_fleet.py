"""The engines of one update: who is refused and why, who is paused and resumed, locks, retries of a flush."""

import contextlib
import re
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace

import pytest

from ckpt_core import fleet as fleet_module
from ckpt_core.capability import FULL, Capability, not_implemented
from ckpt_core.config import UpdateConfig
from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, EngineInfo, PauseMode, Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import ConfigError, EngineError, EngineStateError, EngineUnavailable
from ckpt_core.fleet import EndpointLocks, Fleet, Member
from ckpt_core.in_flight import Fate


class Plugin:
    """Answers control calls from a script and notes them."""

    def __init__(self, *, state=EndpointState.SERVING, engine="toy", world_size=1, flushes=(), capabilities=None):
        self.calls = []
        self.status = EndpointStatus(
            engine=engine, state=state, world_size=world_size, device_kind=DeviceKind.CPU, detail="told so"
        )
        self.info = EngineInfo(
            name="toy",
            plugin_version="1",
            engine_version=None,
            capabilities=capabilities or dict.fromkeys(Capability, FULL),
        )
        self.flushes = list(flushes)
        self.attach = lambda _rendezvous: None
        self.hook = types.SimpleNamespace(
            ckpt_ready=lambda endpoint: self.status,
            ckpt_pause=lambda endpoint, mode: self.calls.append(("pause", mode)) or 3,
            ckpt_attach=lambda endpoint, rendezvous: self.attach(rendezvous),
            ckpt_flush_cache=lambda endpoint: self._flush(),
            ckpt_resume=lambda endpoint, version: self.calls.append(("resume", version)),
        )

    def has(self, _hook):
        return True

    def _flush(self):
        self.calls.append("flush")
        if self.flushes and (error := self.flushes.pop(0)):
            raise error


def member(plugin, url="http://a"):
    return Member(endpoint=Endpoint(url=url, engine="toy"), plugin=plugin)


@pytest.fixture
def fleet_of():
    with contextlib.ExitStack() as stack:

        def fleet_of(*plugins):
            made = Fleet(members=[member(plugin, f"http://{number}") for number, plugin in enumerate(plugins)])
            stack.callback(made.close)
            return made

        yield fleet_of


def rendezvous(index):
    return Rendezvous(address="ipc://x", token="t", update_id="u", silence_timeout_s=1.0, endpoint_index=index)  # noqa: S106


def test_an_update_needs_engines_and_each_once():
    with pytest.raises(ConfigError, match="at least one endpoint"):
        Fleet(members=[])
    with pytest.raises(ConfigError, match="the same endpoint is named twice"):
        Fleet(members=[member(Plugin()), member(Plugin())])


@pytest.mark.parametrize("state", [EndpointState.SERVING, EndpointState.PAUSED, EndpointState.POISONED])
def test_these_can_be_updated(fleet_of, state):
    fleet = fleet_of(Plugin(state=state, world_size=2))
    fleet.check()
    assert fleet.members[0].world_size == 2


@pytest.mark.parametrize(
    ("state", "kind", "says"),
    [
        (EndpointState.STARTING, EngineUnavailable, "wait until it is up"),
        (EndpointState.DEAD, EngineUnavailable, "restart it"),
        (EndpointState.ASLEEP, EngineStateError, "wake it first"),
        (EndpointState.UPDATING, EngineStateError, "another update is running"),
    ],
)
def test_these_cannot_and_say_what_to_do(fleet_of, state, kind, says):
    with pytest.raises(kind, match=f"toy at http://1 is {state.value} .told so.; .*{says}"):
        fleet_of(Plugin(), Plugin(state=state)).check()


def test_another_engine_is_refused(fleet_of):
    with pytest.raises(EngineUnavailable, match="http://0 is engine 'vllm', expected 'toy'"):
        fleet_of(Plugin(engine="vllm")).check()


@pytest.mark.parametrize("mode", PauseMode)
def test_a_pause_that_a_plugin_cannot_do_is_refused_before_it(fleet_of, mode):
    claims = dict.fromkeys(Capability, FULL)
    needed = Capability.PAUSE_KEEP if mode is PauseMode.IN_PLACE else Capability[f"PAUSE_{mode.name}"]
    claims[needed] = not_implemented("not here")
    fleet = fleet_of(Plugin(), Plugin(capabilities=claims))
    fleet.check()
    with pytest.raises(ConfigError, match=f"http://1: pause mode {mode.value} is not_implemented .not here."):
        fleet.check_options(UpdateConfig(pause_mode=mode, allow_stale_cache=True))


def test_only_who_was_paused_here_is_resumed(fleet_of):
    serving, paused = Plugin(), Plugin(state=EndpointState.PAUSED)
    fleet = fleet_of(serving, paused)
    fleet.check()
    fleet.pause(PauseMode.ABORT)
    fleet.resume("v1")
    fleet.resume("v2")
    assert serving.calls == [("pause", PauseMode.ABORT), ("resume", "v1")]
    assert paused.calls == []


def test_requests_in_flight_are_told_by_engine_with_the_versions_of_their_tokens(fleet_of):
    loud, silent, paused = Plugin(), Plugin(), Plugin(state=EndpointState.PAUSED)
    silent.hook.ckpt_pause = lambda endpoint, mode: None
    for plugin in (loud, silent, paused):
        plugin.status = replace(plugin.status, version="old")
    fleet = fleet_of(loud, silent, paused)
    fleet.check()
    fleet.pause(PauseMode.WAIT)
    met = fleet.in_flight(PauseMode.WAIT, "new")
    assert [one.requests for one in met] == [3, None, None]
    assert {(one.fate, one.old_version, one.new_version) for one in met} == {(Fate.FINISHED, "old", "new")}


def test_a_pause_that_failed_half_way_is_undone_on_all(fleet_of):
    good, bad = Plugin(), Plugin()

    def fail(endpoint, mode):
        raise EngineUnavailable("no answer")

    bad.hook.ckpt_pause = fail
    fleet = fleet_of(good, bad)
    fleet.check()
    with pytest.raises(EngineUnavailable, match="no answer"):
        fleet.pause(PauseMode.WAIT)
    fleet.resume(None)
    assert ("resume", None) in good.calls
    assert ("resume", None) in bad.calls


# -- attach ------------------------------------------------------------------------------------------------------
def watch(fleet, timeout_s=10.0):
    """As the controller does, again and again."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while time.monotonic() < deadline:
        fleet.check_attached()
        pause.wait(0.01)


def test_attach_calls_run_at_once_and_know_their_index(fleet_of):
    meeting, seen = threading.Barrier(3, timeout=10.0), []
    plugins = [Plugin(), Plugin()]

    def attach(given):
        seen.append(given.endpoint_index)
        meeting.wait()

    for plugin in plugins:
        plugin.attach = attach
    fleet = fleet_of(*plugins)
    fleet.attach(rendezvous)
    fleet.check_attached()  # both still run: no complaint
    meeting.wait()
    assert fleet.detach(10.0)
    assert sorted(seen) == [0, 1]


def test_an_attach_call_that_comes_back_early_ends_the_update(fleet_of):
    fleet = fleet_of(Plugin())
    fleet.attach(rendezvous)
    assert fleet.detach(10.0)
    fleet.check_attached()  # its ranks' last words may still be on their way
    with pytest.raises(EngineError, match="toy at http://0 left the update before its end"):
        watch(fleet)


def test_the_error_of_an_attach_call_is_raised_as_it_is(fleet_of):
    plugin = Plugin()

    def refuse(_rendezvous):
        raise EngineStateError("already updating")

    plugin.attach = refuse
    fleet = fleet_of(plugin)
    fleet.attach(rendezvous)
    assert fleet.detach(10.0)
    with pytest.raises(EngineStateError, match="already updating"):
        watch(fleet)


def test_a_call_that_does_not_come_back_is_told(fleet_of):
    gate, plugin = threading.Event(), Plugin()
    plugin.attach = lambda _rendezvous: gate.wait(10.0)
    fleet = fleet_of(plugin)
    fleet.attach(rendezvous)
    assert not fleet.detach(0.05)
    gate.set()
    assert fleet.detach(10.0)


def checked(fleet):
    fleet.check()
    return fleet


# -- flush -------------------------------------------------------------------------------------------------------
def test_a_flush_is_tried_again_until_it_succeeds(fleet_of, monkeypatch):
    monkeypatch.setattr(fleet_module, "_FLUSH_RETRY_S", 0.001)
    plugin = Plugin(flushes=[EngineError("busy"), EngineStateError("busy"), None])
    assert checked(fleet_of(plugin)).flush(accept_stale=False, timeout_s=10.0) == {}
    assert plugin.calls == ["flush"] * 3


def test_a_flush_that_never_succeeds_ends_by_its_deadline(fleet_of, monkeypatch):
    monkeypatch.setattr(fleet_module, "_FLUSH_RETRY_S", 0.001)
    plugin = Plugin(flushes=[EngineError("busy")] * 10_000)
    (error,) = checked(fleet_of(plugin)).flush(accept_stale=False, timeout_s=0.05).values()
    assert re.search(r"has the new weights but still a cache of the old ones.*busy", str(error))


def test_an_engine_that_is_gone_is_not_waited_for_and_holds_nobody_up(fleet_of):
    gone, alive = Plugin(flushes=[EngineUnavailable("nobody answers")] * 10), Plugin()
    errors = checked(fleet_of(gone, alive)).flush(accept_stale=False, timeout_s=30.0)
    assert gone.calls == ["flush"]
    assert [str(error) for error in errors.values()] == ["nobody answers"]


def test_another_life_of_an_engine_may_not_serve(fleet_of):
    plugin = Plugin()
    fleet = checked(fleet_of(plugin))
    fleet.members[0].status = replace(fleet.members[0].status, instance_id="before")
    plugin.status = replace(plugin.status, instance_id="after")
    (error,) = fleet.flush(accept_stale=True, timeout_s=1.0).values()
    assert "restarted during the update (instance after, expected before)" in str(error)
    assert plugin.calls == []


def test_a_stale_cache_is_kept_where_accepted(fleet_of):
    plugin = Plugin(flushes=[EngineError("busy")] * 10)
    assert checked(fleet_of(plugin)).flush(accept_stale=True, timeout_s=10.0) == {}
    assert plugin.calls == ["flush"]


# -- locks -------------------------------------------------------------------------------------------------------
def test_two_updates_of_one_endpoint_exclude_each_other(tmp_path):
    with EndpointLocks(tmp_path) as first, EndpointLocks(tmp_path) as second:
        first.take("http://a:1")
        with pytest.raises(EngineStateError, match="another update of http://a:1/ is running"):
            second.take("http://a:1/")
        second.take("http://a:2")
    with EndpointLocks(tmp_path) as third:
        third.take("http://a:1")


def test_a_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ckpt_core.fleet import EndpointLocks\n"
        "locks = EndpointLocks(Path(sys.argv[1])); locks.take('http://a'); print('held', flush=True); input()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with EndpointLocks(tmp_path) as locks:
            with pytest.raises(EngineStateError):
                locks.take("http://a")
            holder.kill()
            holder.wait()
            locks.take("http://a")
