"""What is SGLang's own, on real servers and engines: a start that waits, resumes that nobody may, users in one process."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_core import Outcome, Target, UpdateAborted, UpdateConfig, Updater
from ckpt_core.agents import AgentGroup
from ckpt_core.config import child_environment
from ckpt_core.contract import EndpointState, PauseMode
from ckpt_core.errors import EngineStateError
from ckpt_sglang.launch import WAIT_FOR_WEIGHTS, SglangServer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
PROMPT = [5, 17, 42, 8]
TOKENS = 8
WAITED = (
    "the server stays unhealthy until an update commits"  # what the log says when SGLang itself would have given up
)
UNAVAILABLE, CONFLICT, BAD_REQUEST = 503, 409, 400


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoints")
    first = make_tiny(base / "a", seed=1)
    bare = make_tiny(base / "bare", seed=1)
    (bare / "model.safetensors").unlink()
    return {"a": first, "b": perturb(first, base / "b", seed=2), "bare": bare}


@pytest.fixture(scope="module")
def fresh(checkpoints):
    """Tokens of a fresh start on A at the same degree of parallelism."""
    with SglangServer(checkpoints["a"], tp=2) as server:
        return server.generate(PROMPT, TOKENS)


@pytest.fixture(scope="module")
def server(checkpoints):
    """Two ranks that wait for their first weights, from a directory that has none; SGLang would wait for three seconds."""
    environment = {"SGLANG_WAIT_WEIGHTS_READY_TIMEOUT": "3"}
    with SglangServer(
        checkpoints["bare"], tp=2, load_format="dummy", extra=WAIT_FOR_WEIGHTS, healthy=False, environment=environment
    ) as server:
        yield server


@pytest.fixture
def updater(server):
    config = UpdateConfig(ring_bytes=1 << 14, bucket_bytes=1 << 13, pause_mode=PauseMode.ABORT)
    with Updater([Target(engine="sglang", url=server.url)], config=config) as made:
        yield made


@pytest.fixture
def fail_in_the_middle(updater, checkpoints, tmp_path, monkeypatch):
    """An update whose source is cut when ranks have begun."""
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((checkpoints["b"] / "model.safetensors").read_bytes())
    start_sending = AgentGroup.start_sending

    def cut_and_send(agents, **options):
        os.truncate(copy, copy.stat().st_size // 2)
        start_sending(agents, **options)

    def fail():
        with monkeypatch.context() as patch:
            patch.setattr(AgentGroup, "start_sending", cut_and_send)
            with pytest.raises(UpdateAborted) as caught:
                updater.update(copy, version="cut")
        return caught.value.outcome

    return fail


def ask(server):
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
    return server.post("/generate", body).status_code


def until(holds, why, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, why
        threading.Event().wait(0.1)


# -- in the order in which a server lives ------------------------------------------------------------------------------
def test_the_wait_for_weights_does_not_end_with_sglangs_timeout(server):
    until(lambda: WAITED in server.log(), "SGLang's timeout was never reached")
    assert not server.healthy
    assert server.status()["state"] == EndpointState.WAITING_FOR_WEIGHTS.value
    assert ask(server) == UNAVAILABLE
    server.post("/continue_generation", {})
    assert ask(server) == UNAVAILABLE


def test_a_request_of_somebody_else_is_left_to_sglang_and_opens_nothing(server):
    answer = server.post("/update_weights_from_ipc", {"zmq_handles": {"GPU-x": "ipc:///nowhere"}})
    assert answer.status_code == BAD_REQUEST
    assert "ckpt" not in answer.json()["message"]
    assert server.status()["state"] == EndpointState.WAITING_FOR_WEIGHTS.value
    assert not server.healthy


def test_a_failed_first_update_leaves_it_unhealthy(server, fail_in_the_middle):
    assert fail_in_the_middle() is Outcome.POISONED
    assert server.status()["state"] == EndpointState.POISONED.value
    assert not server.healthy


def test_the_first_commit_makes_it_healthy(server, updater, checkpoints, fresh):
    updater.update(checkpoints["a"], version="one")
    until(lambda: server.healthy, "committed, resumed, and not healthy")
    assert server.generate(PROMPT, TOKENS) == fresh
    status = server.status()
    assert (status["state"], status["version"], status["world_size"]) == (EndpointState.SERVING.value, "one", 2)


def test_no_client_resumes_poisoned_weights_and_the_next_update_repairs_them(
    server, updater, checkpoints, fresh, fail_in_the_middle
):
    assert fail_in_the_middle() is Outcome.POISONED
    assert not server.healthy
    for route in ("/continue_generation", "/ckpt/resume"):
        assert server.post(route, {}).status_code == CONFLICT
    updater.update(checkpoints["a"], version="repaired")
    assert server.healthy
    assert server.generate(PROMPT, TOKENS) == fresh


def test_a_server_that_a_client_paused_stays_paused_and_tells_the_new_version(server, updater, checkpoints, fresh):
    server.post("/pause_generation", {"mode": "abort"}).raise_for_status()
    updater.update(checkpoints["b"], version="b")
    updater.update(checkpoints["a"], version="a")
    status = server.status()
    assert (status["state"], status["version"]) == (EndpointState.PAUSED.value, "a")
    server.post("/continue_generation", {}).raise_for_status()
    answer = server.complete(PROMPT, TOKENS)
    assert answer["output_ids"] == fresh
    assert answer["meta_info"]["weight_version"] == "a"


def test_an_update_in_the_middle_of_sglangs_own_is_refused(server, updater, checkpoints, fresh):
    server.post("/begin_weight_update", {}).raise_for_status()
    with pytest.raises((UpdateAborted, EngineStateError), match="end_weight_update"):
        updater.update(checkpoints["b"], version="b")
    server.post("/end_weight_update", {}).raise_for_status()
    assert server.generate(PROMPT, TOKENS) == fresh


def test_memory_that_was_released_is_refused_until_it_is_back(server, updater, checkpoints, fresh):
    server.post("/release_memory_occupation", {"tags": ["weights"]}).raise_for_status()
    assert server.status()["state"] == EndpointState.ASLEEP.value
    with pytest.raises(EngineStateError, match="wake it first"):
        updater.update(checkpoints["b"], version="b")
    server.post("/resume_memory_occupation", {"tags": ["weights"]}).raise_for_status()
    assert server.generate(PROMPT, TOKENS) == fresh


# -- an engine in the user's own process -------------------------------------------------------------------------------
def test_an_engine_in_ones_own_process(checkpoints):
    script = Path(__file__).parent / "in_process_user.py"
    arguments = [str(checkpoints[which]) for which in ("bare", "a", "b")]
    environment = {**child_environment(), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["versions"] == ["one", "two"]
    assert said["tokens"][0] != said["tokens"][1]
    assert said["babble"] not in said["tokens"]
    assert said["after_async"] == said["tokens"][0]
    assert [span["version"] for span in said["spans"]] == ["two"], (
        "a request in flight ends on the weights it began with"
    )
    assert said["refused"], "a poisoned engine was resumed"
    assert said["repaired"] == said["tokens"][1]
