"""The engine as processes: agreement of tensor parallel degrees, pause modes, control calls, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from ckpt_conformance.models.tiny import Arch, make_tiny
from ckpt_conformance.reference import plugin as reference
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_conformance.reference.worker import Worker
from ckpt_core.contract import EndpointState, PauseMode, Rendezvous
from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.errors import EngineError, EngineStateError, EngineUnavailable
from ckpt_core.plugins import EnginePlugin

pytestmark = pytest.mark.integration

PROMPT = list(range(2, 30))
DEADLINE_S = 20.0
hook = EnginePlugin(reference, name="reference").hook


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # float32: a sequence computed again in one go must not differ by rounding from one computed token by token
    return make_tiny(tmp_path_factory.mktemp("model"), "qwen3", 1, dtype="float32")


@pytest.fixture(scope="module")
def shared_server(model: Path) -> Iterator[ReferenceServer]:
    with ReferenceServer(model, tp=2, version="v1", extra=["--max-waiting=3"]) as server:
        yield server


@pytest.fixture
def server(shared_server: ReferenceServer) -> Iterator[ReferenceServer]:
    """The shared server, serving at the start of each test and with no request left at its end."""
    yield shared_server
    shared_server.post("/pause", mode="abort")
    shared_server.client.post("/resume", json={"version": "v1"}).raise_for_status()


class Streaming:
    """A long request, at least one token of which has arrived. `rest()` reads it to its end."""

    def __init__(self, server: ReferenceServer, max_tokens: int = 300) -> None:
        self._events = server.stream(PROMPT, max_tokens, ignore_eos=True)
        self.first = next(self._events)

    def rest(self) -> dict[str, Any]:
        return list(self._events)[-1]

    def close(self) -> None:
        self._events.close()  # type: ignore[attr-defined]


class Background:
    """A call in a thread, whose result is asked for later."""

    def __init__(self, call: Any) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Any) -> None:
        try:
            self._result = call()
        except httpx.HTTPError as error:
            self._result = error

    def result(self) -> Any:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the call hangs"
        return self._result


def endpoint_of(server: ReferenceServer, *, bearer_token: str = "") -> Endpoint:
    options = EndpointOptions(bearer_token=bearer_token)
    return Endpoint(url=server.url, engine="reference", options=options)


def wait_gone(*pids: int) -> None:
    """Wait until no such process runs any more."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def wait_status(server: ReferenceServer, **expected: Any) -> None:
    """Ask for the status until it holds these fields."""
    deadline = time.monotonic() + DEADLINE_S
    while not expected.items() <= (status := server.status()).items():
        assert time.monotonic() < deadline, f"expected {expected}, got {status}"


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]


@pytest.mark.parametrize(
    ("arch", "tied", "tp"), [("llama", False, 3), ("qwen3", True, 2), ("qwen3_moe", False, 2), ("qwen3_moe", True, 3)]
)
def test_output_is_that_of_transformers_at_every_degree(tmp_path: Path, arch: Arch, tied: bool, tp: int) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_tiny(tmp_path, arch, 6, tied=tied, dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        output = peer.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = output[0, len(PROMPT) :].tolist()
    with ReferenceServer(directory, tp=tp) as server:
        assert server.generate(PROMPT, 24)["token_ids"] == expected
        assert server.generate(PROMPT, 24)["token_ids"] == expected, "with the prefix cache"


def test_answer_has_text_versions_and_reason(server: ReferenceServer, model: Path) -> None:
    answer = server.generate("w5 w6 w7", 6, ignore_eos=True)
    assert answer["token_ids"] == Worker(model).generate([5, 6, 7], 6)
    assert answer["text"] == " ".join(f"w{token}" for token in answer["token_ids"])
    assert answer["finish_reason"] == "length"
    assert answer["weight_versions"] == [{"version": "v1", "start": 0, "end": 6}]
    assert answer["version"] == "v1"


def test_stream_brings_each_token_and_then_the_whole_answer(server: ReferenceServer) -> None:
    *tokens, last = server.stream(PROMPT, 9, ignore_eos=True)
    assert [event["token_id"] for event in tokens] == last["token_ids"]
    assert "".join(event["text"] for event in tokens) == last["text"]
    assert {event["version"] for event in tokens} == {"v1"}


def test_concurrent_requests_get_what_they_get_alone(server: ReferenceServer) -> None:
    prompts = [[token, token + 1] for token in range(2, 8)]
    alone = [server.generate(prompt, 12, ignore_eos=True)["token_ids"] for prompt in prompts]
    calls = [Background(lambda p=prompt: server.generate(p, 12, ignore_eos=True)) for prompt in prompts[:3]]
    assert [call.result()["token_ids"] for call in calls] == alone[:3]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "w5", "prompt_token_ids": [5]},
        {"prompt_token_ids": []},
        {"prompt_token_ids": [100]},
        {"prompt_token_ids": [5], "max_tokens": 0},
        {"prompt_token_ids": [5] * 4096},
        {"prompt_token_ids": "w5"},
        {"prompt": "w5", "temperature": 1},
    ],
)
def test_bad_request_is_refused(server: ReferenceServer, body: dict[str, Any]) -> None:
    response = server.client.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]


def test_pause_abort_ends_requests_with_what_they_have(server: ReferenceServer) -> None:
    request = Streaming(server)
    assert server.post("/pause", mode="abort").json() == {"in_flight": 0}
    answer = request.rest()
    assert answer["finish_reason"] == "abort"
    assert 1 <= len(answer["token_ids"]) < 300
    assert server.status()["state"] == "paused"


def test_pause_wait_lets_requests_finish(server: ReferenceServer) -> None:
    request = Streaming(server, max_tokens=40)
    assert server.post("/pause", mode="wait").json() == {"in_flight": 0}
    answer = request.rest()
    assert (answer["finish_reason"], len(answer["token_ids"])) == ("length", 40)


def test_resume_ends_a_pause_that_still_waits(server: ReferenceServer) -> None:
    request = Streaming(server)
    pausing = Background(lambda: server.post("/pause", mode="wait"))
    wait_status(server, pause_mode="wait")
    server.client.post("/resume").raise_for_status()
    assert refusal(pausing.result()) == (409, "resumed before the pause was complete")
    request.close()


@pytest.mark.parametrize(("mode", "flushes"), [("keep", False), ("retract", True)])
def test_frozen_request_goes_on_and_each_token_has_its_version(
    server: ReferenceServer, mode: str, flushes: bool
) -> None:
    alone = server.generate(PROMPT, 150, ignore_eos=True)["token_ids"]
    request = Streaming(server, max_tokens=150)
    assert server.post("/pause", mode=mode).json() == {"in_flight": 1}
    assert server.post("/flush_cache").status_code == (200 if flushes else 409)
    if not flushes:
        assert refusal(server.post("/pause", mode="wait"))[0] == 409
    server.client.post("/resume", json={"version": "v2"}).raise_for_status()
    answer = request.rest()
    assert answer["token_ids"] == alone
    first, second = answer["weight_versions"]
    assert (first["version"], first["start"], second["version"], second["end"]) == ("v1", 0, "v2", 150)
    assert first["end"] == second["start"] >= 1
    assert answer["version"] == "v2"


def test_flush_is_refused_while_a_request_runs(server: ReferenceServer) -> None:
    request = Streaming(server)
    code, error = refusal(server.post("/flush_cache"))
    assert code == 409
    assert "hold keys and values" in error
    request.close()


def test_requests_queue_while_paused_up_to_the_limit(server: ReferenceServer) -> None:
    server.post("/pause", mode="abort")
    queued = [Background(lambda: server.generate([5, 6], 2)) for _ in range(3)]
    wait_status(server, waiting=3)
    response = server.client.post("/generate", json={"prompt_token_ids": [5]})
    assert refusal(response) == (429, "3 requests wait already; try again later")
    server.client.post("/resume").raise_for_status()
    assert [len(call.result()["token_ids"]) for call in queued] == [2, 2, 2]


def test_client_that_goes_away_frees_its_place(server: ReferenceServer) -> None:
    Streaming(server).close()
    assert server.post("/pause", mode="wait").json() == {"in_flight": 0}
    assert server.status()["running"] == 0


def test_attach_is_refused_unless_paused_and_awake(model: Path) -> None:
    token = "t"  # noqa: S105
    nowhere = Rendezvous(address="tcp://127.0.0.1:9", token=token, update_id="u1", silence_timeout_s=1.0)
    with (
        ReferenceServer(model) as server,
        closing(endpoint_of(server)) as endpoint,
        closing(endpoint_of(server)) as other,
    ):
        with pytest.raises(EngineStateError, match="expected paused"):
            hook.ckpt_attach(endpoint=endpoint, rendezvous=nowhere)
        hook.ckpt_pause(endpoint=endpoint, mode=PauseMode.ABORT)
        attaching = Background(lambda: hook.ckpt_attach(endpoint=other, rendezvous=nowhere))
        wait_status(server, state="updating")
        for refused in ("/resume", "/flush_cache", "/sleep", "/wake", "/pause"):
            assert server.post(refused).status_code == 409
        with pytest.raises(EngineStateError, match="updating"):
            hook.ckpt_attach(endpoint=endpoint, rendezvous=nowhere)
        attaching.result()
        assert hook.ckpt_ready(endpoint=endpoint).state is EndpointState.PAUSED
        server.post("/sleep").raise_for_status()
        with pytest.raises(EngineStateError, match="asleep"):
            hook.ckpt_attach(endpoint=endpoint, rendezvous=nowhere)
        hook.ckpt_wake(endpoint=endpoint, tags=("weights", "kv_cache"))
        with pytest.raises(EngineStateError, match="waiting_for_weights"):
            hook.ckpt_resume(endpoint=endpoint, version=None)
        assert server.client.get("/health").status_code == 503


def test_unknown_modes_levels_and_tags_are_bad_requests(server: ReferenceServer) -> None:
    for path, name, value in (("/pause", "mode", "in_place"), ("/sleep", "level", "2"), ("/wake", "tags", "x")):
        code, error = refusal(server.post(path, **{name: value}))
        assert code == 400
        assert value in error


def test_version_can_be_named(server: ReferenceServer) -> None:
    assert server.client.get("/version").json() == {"version": "v1"}
    assert server.client.post("/version", json={"version": "v9"}).json() == {"version": "v9"}
    assert server.generate([5], 1)["version"] == "v9"


def test_live_digests_are_the_same_for_the_same_weights(server: ReferenceServer, model: Path) -> None:
    ranks = server.live_digests()
    assert len(ranks) == 2
    assert ranks[0]["model.norm.weight"] == ranks[1]["model.norm.weight"]
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    assert ranks[0][qkv] != ranks[1][qkv]


def test_waiting_server_is_not_healthy_and_refuses(model: Path) -> None:
    arguments: dict[str, Any] = {"load_format": "dummy", "wait_for_weights": True, "bearer_token": "s3cret"}
    with ReferenceServer(model, **arguments) as server:
        health = server.client.get("/health")
        assert (health.status_code, health.json()["state"]) == (503, "waiting_for_weights")
        assert server.client.post("/generate", json={"prompt": "w5"}).status_code == 503
        assert server.status()["version"] == ""
        with closing(endpoint_of(server)) as endpoint, pytest.raises(EngineError, match="401"):
            hook.ckpt_ready(endpoint=endpoint)
        with closing(endpoint_of(server, bearer_token="s3cret")) as endpoint:  # noqa: S106
            assert hook.ckpt_ready(endpoint=endpoint).state is EndpointState.WAITING_FOR_WEIGHTS


def test_killed_rank_is_noticed_and_nothing_hangs(model: Path) -> None:
    with ReferenceServer(model, tp=2) as server:
        request = Streaming(server)
        os.kill(server.rank_pids[1], signal.SIGKILL)
        assert request.rest()["finish_reason"] == "error"
        wait_gone(*server.rank_pids)
        health = server.client.get("/health")
        assert (health.status_code, health.json()["state"]) == (503, "dead")
        assert "is gone" in health.json()["detail"]
        assert server.client.post("/generate", json={"prompt": "w5"}).status_code == 503
        assert server.post("/pause").status_code == 503


def test_rank_killed_while_idle_is_noticed(model: Path) -> None:
    with ReferenceServer(model) as server:
        os.kill(server.rank_pids[0], signal.SIGKILL)
        wait_gone(*server.rank_pids)
        wait_status(server, state="dead")
        with closing(endpoint_of(server)) as endpoint:
            status = hook.ckpt_ready(endpoint=endpoint)
            assert status.state is EndpointState.DEAD
            assert f"pid {server.rank_pids[0]}" in status.detail
            with pytest.raises(EngineUnavailable, match="dead"):
                hook.ckpt_pause(endpoint=endpoint, mode=PauseMode.ABORT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_takes_its_ranks_with_it(model: Path, number: signal.Signals) -> None:
    with ReferenceServer(model, tp=2) as server:
        request = Streaming(server)
        os.kill(server.pid, number)
        wait_gone(*server.pids)
        if number is signal.SIGTERM:
            assert request.rest()["finish_reason"] == "abort"
        else:
            with pytest.raises(httpx.HTTPError):
                request.rest()


def test_server_ends_when_whoever_started_it_is_killed(model: Path) -> None:
    script = (
        "import sys; from ckpt_conformance.reference.launch import ReferenceServer\n"
        "with ReferenceServer(sys.argv[1]) as server:\n"
        "    print(*server.pids, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(pids) == 2
        starter.kill()
    wait_gone(*pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tp": 5}, "not divisible by --tp 5"), ({"extra": ["--plugin=nobody"]}, "No module named 'nobody'")],
)
def test_start_that_fails_says_why_and_leaves_nothing(model: Path, arguments: dict[str, Any], message: str) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(EngineUnavailable, match=message), ReferenceServer(model, **arguments):
        pass
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
