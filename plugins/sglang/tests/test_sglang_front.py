"""The process that takes requests: pauses, refused resumes, and the wait for first weights."""

import asyncio
from types import SimpleNamespace

import pytest

from ckpt_core.contract import EndpointState, PauseMode
from ckpt_core.errors import EngineError, EngineStateError
from ckpt_sglang import compat, compat_front
from ckpt_sglang.control import EngineControl
from ckpt_sglang.front import around_continue, wait_for_weights

FACTS = {
    "instance_id": "abc",
    "world_size": 1,
    "device_kind": "cpu",
    "version": "one",
    "asleep": False,
    "waiting": False,
    "refuses": "",
    "poisoned": False,
    "paused": False,
}


class Lock:
    def __init__(self, looks):
        self.looks = looks

    async def is_locked(self):
        self.looks -= 1
        return self.looks >= 0


class Manager:
    """What EngineControl uses of a tokenizer manager.

    looks: how often requests are still there.
    """

    def __init__(self, looks=0, **facts):
        self.facts = FACTS | facts
        self.states = [{"ckpt": self.facts}]
        self.rid_to_state = {"a": None}
        self.is_pause = False
        self.is_pause_cond = asyncio.Condition()
        self.model_update_lock = Lock(looks)
        self.calls = []
        self.server_status = SimpleNamespace(name="Up")

    async def get_internal_state(self):
        return self.states

    def abort_request(self, abort_all):
        self.calls.append("abort")

    async def pause_generation(self, request):
        self.calls.append(f"pause {request.mode}")

    async def continue_generation(self, request):
        self.calls.append("continue")

    async def update_weight_version(self, request):
        self.calls.append(f"version {request.new_version} {request.abort_all_requests}")


@pytest.fixture(autouse=True)
def sglang(monkeypatch):
    """Its messages are namespaces, its topology is one that can be updated."""
    messages = SimpleNamespace(PauseGenerationReqInput=SimpleNamespace, UpdateWeightVersionReqInput=SimpleNamespace)
    monkeypatch.setattr(compat_front, "requests", lambda: messages)
    monkeypatch.setattr(compat_front, "continue_request", SimpleNamespace)
    monkeypatch.setattr(compat, "check_topology", lambda: None)
    monkeypatch.setattr(compat_front, "conflict", PermissionError)


def run(work):
    return asyncio.run(work)


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        (PauseMode.ABORT, ["abort", "pause retract"]),
        (PauseMode.WAIT, ["pause retract"]),
        (PauseMode.RETRACT, ["pause retract"]),
        (PauseMode.IN_PLACE, ["pause in_place"]),
        (PauseMode.KEEP, ["pause in_place"]),
    ],
)
def test_what_each_mode_does(mode, calls):
    manager = Manager(looks=1)
    assert run(EngineControl(manager).pause(mode, 5.0)) == 1
    assert manager.calls == calls


def test_a_wait_that_takes_too_long_leaves_the_engine_serving():
    manager = Manager(looks=10**9)
    with pytest.raises(EngineStateError, match=r"did not end within 0\.05 s"):
        run(EngineControl(manager).pause(PauseMode.WAIT, 0.05))
    assert not manager.is_pause
    assert manager.calls == []


def test_a_resume_names_the_version_first_and_aborts_nobody():
    manager = Manager()
    run(EngineControl(manager).resume("two"))
    assert manager.calls == ["version two False", "continue"]


def test_poisoned_weights_are_not_resumed():
    manager = Manager(refuses="mixed", poisoned=True)
    with pytest.raises(EngineStateError, match="mixed"):
        run(EngineControl(manager).resume(None))
    assert manager.calls == []


def test_a_clients_own_resume_is_refused_before_anything_is_told():
    async def original(manager, request):
        manager.calls.append("told")

    poisoned, whole = Manager(refuses="mixed", poisoned=True), Manager()
    with pytest.raises(PermissionError, match="mixed"):
        run(around_continue(original, poisoned, None))
    assert poisoned.calls == []
    run(around_continue(original, whole, None))
    assert whole.calls == ["told"]


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, EndpointState.SERVING),
        ({"waiting": True, "refuses": "none yet"}, EndpointState.WAITING_FOR_WEIGHTS),
        ({"poisoned": True, "refuses": "mixed"}, EndpointState.POISONED),
        ({"poisoned": True, "waiting": True, "refuses": "mixed"}, EndpointState.POISONED),
        ({"asleep": True, "poisoned": True}, EndpointState.ASLEEP),
    ],
)
def test_states(facts, state):
    assert run(EngineControl(Manager(**facts)).status()).state is state


def test_paused_and_updating_are_told():
    manager = Manager()
    manager.is_pause = True
    control = EngineControl(manager)
    assert run(control.status()).state is EndpointState.PAUSED
    control.updating = True
    assert run(control.status()).state is EndpointState.UPDATING


def test_a_scheduler_without_the_plugin():
    manager = Manager()
    manager.states = [{}]
    with pytest.raises(EngineError, match="SGLANG_PLUGINS"):
        run(EngineControl(manager).status())


# -- the wait for first weights ----------------------------------------------------------------------------------------
class Waiting:
    """Has weights, and is resumed, after so many looks."""

    def __init__(self, weights_at, resumed_at, exit_at=10**9):
        self.looks = 0
        self.weights_at, self.resumed_at, self.exit_at = weights_at, resumed_at, exit_at

    @property
    def initial_weights_loaded(self):
        self.looks += 1
        return self.looks > self.weights_at

    @property
    def is_pause(self):
        return self.looks <= self.resumed_at

    @property
    def gracefully_exit(self):
        return self.looks >= self.exit_at


@pytest.fixture
def http(monkeypatch):
    monkeypatch.setattr("ckpt_sglang.front._POLL_S", 0.001)
    return SimpleNamespace(WAIT_WEIGHTS_READY_TIMEOUT=0)


def test_the_wait_goes_on_past_its_timeout_and_says_so_once(http, caplog):
    manager = Waiting(weights_at=20, resumed_at=0)
    wait_for_weights(manager, http)
    assert manager.looks > 20
    assert len([record for record in caplog.records if "stays unhealthy" in record.message]) == 1


def test_the_wait_goes_on_until_somebody_resumed(http):
    manager = Waiting(weights_at=2, resumed_at=10)
    wait_for_weights(manager, http)
    assert manager.looks > 10


def test_the_wait_ends_with_the_server_and_never_returns_into_its_warm_up(http):
    manager = Waiting(weights_at=10**9, resumed_at=0, exit_at=5)
    with pytest.raises(SystemExit):  # which ends the thread it runs in
        wait_for_weights(manager, http)
