"""Start a real vLLM server as a process of its own, for tests and the conformance suite."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

from ckpt_core.config import child_environment
from ckpt_core.endpoint import KEPT_ALIVE
from ckpt_core.errors import EngineUnavailable

_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.25
MODEL = "ckpt"
NATIVE = ("--weight-transfer-config", '{"backend": "ckpt"}')
EXTENSION = ("--worker-extension-cls", "ckpt_vllm.extension.CkptWorkerExtension")


class VllmServer:
    """A running server; a context manager that leaves nothing behind, also when this process is killed.

    Args:
        checkpoint: directory with config.json, tokenizer and (unless dummy) weights.
        tp: tensor parallel degree.
        load_format: "auto", or "dummy" for random weights of that structure.
        road: NATIVE, EXTENSION, or () for a vLLM that offers no way in.
        extra: more arguments for the server.
        environment: more environment variables for it.
        max_model_len: longest sequence.
        eager: without CUDA graphs and compilation.
        python: interpreter of the environment that has vLLM.

    Attributes:
        url: where it serves.
        pid: leader of its process group.
        log_path: what all its processes wrote; gone when the server is.
        client: HTTP client for it.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        tp: int = 1,
        load_format: str = "auto",
        road: Sequence[str] = NATIVE,
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        max_model_len: int = 128,
        eager: bool = True,
        python: str = sys.executable,
        start_timeout_s: float = 240.0,
    ) -> None:
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [
            python,
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
            *("--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", MODEL),
            *("--tensor-parallel-size", str(tp), "--load-format", load_format, "--max-model-len", str(max_model_len)),
            *(("--enforce-eager",) if eager else ()),
            *("--generation-config", "vllm", "--disable-log-stats", *road, *extra),
        ]
        self._environment = {**child_environment(), **_settings(tp), **(environment or {})}
        self._python = python
        self._start_timeout_s = start_timeout_s
        self._stack = ExitStack()
        self.pid = 0

    def __enter__(self) -> VllmServer:
        """Start it and wait until it is healthy.

        Raises:
            EngineUnavailable: it ended or was not healthy in time; with the end of its log.
        """
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-vllm-")))
            self.log_path = directory / "server.log"
            log = stack.enter_context(self.log_path.open("wb"))
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).resolve()), *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
            stack.callback(self._stop)
            client = httpx.Client(base_url=self.url, trust_env=False, timeout=60.0, limits=KEPT_ALIVE)
            self.client = stack.enter_context(client)
            self._await_health(time.monotonic() + self._start_timeout_s)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._stack.close()

    @property
    def alive(self) -> bool:
        """Whether the server and the engine behind it live."""
        try:
            return self.client.get("/health").is_success
        except httpx.HTTPError:
            return False

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int = 16) -> list[int]:
        """Greedy new token ids.

        Raises:
            httpx.HTTPError: no answer, or any other status than 200.
        """
        return [int(token) for token in self.complete(prompt_token_ids, max_tokens)["token_ids"]]

    def complete(
        self, prompt_token_ids: Sequence[int], max_tokens: int = 16, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The first choice of POST /v1/completions, greedy, with token_ids and finish_reason."""
        body = {
            "model": MODEL,
            "prompt": list(prompt_token_ids),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self.client.post("/v1/completions", json=body, timeout=timeout_s).raise_for_status().json()
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def post(self, path: str, **params: str) -> httpx.Response:
        """A control call, whatever its status."""
        return self.client.post(path, params=params)

    def rpc(self, method: str, **kwargs: Any) -> list[Any]:
        """Results of POST /collective_rpc, by rank."""
        answer = self.client.post("/collective_rpc", json={"method": method, "kwargs": kwargs})
        return list(answer.raise_for_status().json()["results"])

    def live_digests(self) -> list[dict[str, str]]:
        """Digest of every live weight, by rank and name; see `ckpt_vllm.digests`."""
        return [dict(result) for result in self.rpc("ckpt_digests")]

    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(errors="replace")

    def _await_health(self, deadline: float) -> None:
        told: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        self.pid = int(told.readline() or 0)
        while not self.alive:
            ended, _, _ = select.select([told], [], [], _POLL_S)  # the pipe ends with the server
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"was not healthy within {self._start_timeout_s:g} s"
                raise EngineUnavailable(f"vLLM {why}; its log ends: {self.log()[-12000:]}")

    def _stop(self) -> None:
        with suppress(OSError):
            self._process.communicate(timeout=_STOP_TIMEOUT_S)  # closes its standard input: it kills the server's group
        self._process.kill()
        self._process.wait()
        _kill_group(self.pid)


def _settings(tp: int) -> dict[str, str]:
    cores = os.cpu_count() or 1
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    if tp > 1:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % cores) for rank in range(tp))
    return settings


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if leader > 1:
            os.killpg(leader, signal.SIGKILL)


def _supervise(command: Sequence[str]) -> None:
    """Run a command in a process group of its own, until it ends or our standard input does; then kill the group."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    try:
        while server.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
            if readable and not sys.stdin.buffer.read1(1):
                break
        server.terminate()
        server.wait(timeout=_STOP_TIMEOUT_S / 2)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill_group(server.pid)


if __name__ == "__main__":
    _supervise(sys.argv[1:])
