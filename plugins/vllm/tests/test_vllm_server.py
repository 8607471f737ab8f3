"""What is vLLM's own: both roads, a start that waits for weights, sessions that nobody finished, resumes that nobody may."""

import httpx
import pytest

from ckpt_conformance.harness import ModelKind
from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_core import Outcome, Target, UpdateAborted, UpdateConfig, Updater
from ckpt_core.agents import AgentGroup
from ckpt_core.contract import EndpointState, PauseMode
from ckpt_core.endpoint import Endpoint
from ckpt_vllm import control
from ckpt_vllm.harness import MODELS
from ckpt_vllm.launch import EXTENSION, VllmServer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(420)]
PROMPT = [5, 17, 42, 8] * 5
NO_TOKEN_S = 4.0
WAITS = ("--additional-config", '{"ckpt": {"wait_for_weights": true}}')


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoints")
    first = make_tiny(base / "a", seed=1, **MODELS[ModelKind.PLAIN])
    return {"a": first, "b": perturb(first, base / "b", seed=2)}


@pytest.fixture(scope="module")
def waiting(checkpoints):
    """By the worker extension, two ranks, and no weights yet."""
    with VllmServer(checkpoints["a"], tp=2, load_format="dummy", road=EXTENSION, extra=WAITS) as server:
        yield server


@pytest.fixture(scope="module")
def native(checkpoints):
    """By the weight-transfer engine, two ranks, on checkpoint A from its files."""
    with VllmServer(checkpoints["a"], tp=2) as server:
        yield server


def update(server, checkpoint, version, **options):
    small = UpdateConfig(ring_bytes=1 << 18, bucket_bytes=1 << 16, **options)
    with Updater([Target(engine="vllm", url=server.url)], config=small) as updater:
        return updater.update(checkpoint, version=version)


def status(server):
    endpoint = Endpoint(url=server.url, engine="vllm")
    try:
        return control.ready(endpoint)
    finally:
        endpoint.close()


def assert_silent(server):
    """Whatever a client does."""
    for _ in range(2):
        assert server.post("/resume").status_code == 500
        with pytest.raises(httpx.TimeoutException):
            server.complete(PROMPT, 4, timeout_s=NO_TOKEN_S)
        assert server.alive


def test_no_token_before_the_first_weights(waiting, native, checkpoints):
    assert status(waiting).state is EndpointState.WAITING_FOR_WEIGHTS
    assert "worker extension" in status(waiting).detail
    assert_silent(waiting)
    update(waiting, checkpoints["a"], "first")
    assert status(waiting).state is EndpointState.SERVING
    assert waiting.live_digests() == native.live_digests()
    assert waiting.generate(PROMPT) == native.generate(PROMPT)


def test_a_session_that_nobody_finished_is_forgotten(native, checkpoints):
    """Its controller died after the start: a second start would raise on every rank."""
    before = native.live_digests()
    assert native.post("/start_weight_update").is_success
    update(native, checkpoints["b"], "b")
    assert native.live_digests() != before
    update(native, checkpoints["a"], "a")
    assert native.live_digests() == before
    assert native.client.get("/weight_info").json() == {"weight_version": "a"}


@pytest.mark.parametrize("mode", [PauseMode.KEEP, PauseMode.RETRACT])
def test_pause_modes_without_requests(native, checkpoints, mode):
    before = native.live_digests()
    update(native, checkpoints["a"], mode.value, pause_mode=mode, allow_stale_cache=mode is PauseMode.KEEP)
    assert native.live_digests() == before
    assert status(native).version == mode.value


def test_mixed_weights_are_silent_until_the_next_update(native, checkpoints, tmp_path, monkeypatch):
    """The file changes when ranks have begun: the last tensor's digest is wrong, the others are loaded by then."""
    before, tokens = native.live_digests(), native.generate(PROMPT)
    broken = tmp_path / "model.safetensors"
    broken.write_bytes((checkpoints["b"] / "model.safetensors").read_bytes())
    start_sending = AgentGroup.start_sending

    def scribble_and_send(agents, **options):
        with broken.open("r+b") as file:
            file.seek(-64, 2)
            file.write(b"\x11" * 32)
        start_sending(agents, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AgentGroup, "start_sending", scribble_and_send)
        with pytest.raises(UpdateAborted) as caught:
            update(native, broken, "broken")
    assert caught.value.outcome is Outcome.POISONED
    assert status(native).state is EndpointState.POISONED
    assert_silent(native)
    update(native, checkpoints["a"], "mended")
    assert native.live_digests() == before
    assert native.generate(PROMPT) == tokens
