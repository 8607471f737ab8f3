"""Start a real SGLang server as a process of its own, for tests and the conformance suite."""

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

_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.25
CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-overlap-schedule", "--mem-fraction-static", "0.1", "--dtype", "bfloat16"),
    "--sleep-on-idle",  # else every idle rank takes a core
    *("--max-total-tokens", "4096", "--context-length", "128", "--max-running-requests", "8"),
)
WAIT_FOR_WEIGHTS = ("--checkpoint-engine-wait-weights-before-ready",)


class SglangServer:
    """A running server; a context manager that leaves nothing behind, also when this process is killed.

    Args:
        checkpoint: directory with config.json, tokenizer and (unless dummy) weights.
        tp: tensor parallel degree.
        load_format: "auto", or "dummy" for random weights of that structure.
        extra: more arguments for the server; they win over those above.
        environment: more environment variables for it.
        healthy: wait until it is; else only until it answers, as a server that waits for its weights does.
        device_options: arguments that make it run on this machine's device.
        python: interpreter of the environment that has SGLang.

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
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        healthy: bool = True,
        device_options: Sequence[str] = CPU,
        python: str = sys.executable,
        start_timeout_s: float = 400.0,
    ) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            python,
            *(
                "-m",
                "sglang.launch_server",
                "--model-path",
                str(checkpoint),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ),
            *("--tp", str(tp), "--load-format", load_format, *device_options, *extra),
        ]
        self._environment = {**child_environment(), **_settings(tp, device_options), **(environment or {})}
        self._healthy = healthy
        self._python = python
        self._start_timeout_s = start_timeout_s
        self._stack = ExitStack()
        self.pid = 0

    def __enter__(self) -> SglangServer:
        """Start it and wait for it.

        Raises:
            EngineUnavailable: it ended or was not up in time; with the end of its log.
        """
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-sglang-")))
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
            self._await(time.monotonic() + self._start_timeout_s)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._stack.close()

    @property
    def healthy(self) -> bool:
        """What a router would be told."""
        return self._answers("/health")

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int = 16) -> list[int]:
        """Greedy new token ids.

        Raises:
            httpx.HTTPError: no answer, or any other status than 200.
        """
        return [int(token) for token in self.complete(prompt_token_ids, max_tokens)["output_ids"]]

    def complete(
        self, prompt_token_ids: Sequence[int], max_tokens: int = 16, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The answer of POST /generate, greedy: output_ids and meta_info."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt_token_ids), "sampling_params": sampling}
        answer = self.client.post("/generate", json=body, timeout=timeout_s).raise_for_status()
        return dict(answer.json())

    def post(self, path: str, body: Mapping[str, Any] | None = None, **params: str) -> httpx.Response:
        """A control call, whatever its status."""
        return self.client.post(path, json=body, params=params)

    def status(self) -> dict[str, Any]:
        """What the plugin in the server says of it."""
        return dict(self.client.get("/ckpt/status").raise_for_status().json())

    def live_digests(self) -> list[dict[str, str]]:
        """Checksum of every live tensor, by rank and name, as SGLang's own weight checker finds them."""
        answer = self.post("/weights_checker", {"action": "checksum"}).raise_for_status().json()
        return [dict(rank["checksums"]) for rank in answer["ranks"]]

    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(errors="replace")

    def _answers(self, path: str) -> bool:
        try:
            return self.client.get(path).is_success
        except httpx.HTTPError:
            return False

    def _await(self, deadline: float) -> None:
        told: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        self.pid = int(told.readline() or 0)
        while not self._answers("/health" if self._healthy else "/ckpt/status"):
            ended, _, _ = select.select([told], [], [], _POLL_S)  # the pipe ends with the server
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"was not up within {self._start_timeout_s:g} s"
                raise EngineUnavailable(f"SGLang {why}; its log ends: {self.log()[-3000:]}")

    def _stop(self) -> None:
        with suppress(OSError):
            self._process.communicate(timeout=_STOP_TIMEOUT_S)  # closes its standard input: it kills the server's group
        self._process.kill()
        self._process.wait()
        _kill_group(self.pid)


def _settings(tp: int, device_options: Sequence[str]) -> dict[str, str]:
    settings = {"HF_HUB_OFFLINE": "1"}
    if "cpu" in device_options:
        settings["SGLANG_USE_CPU_ENGINE"] = "1"
        # tiny models: threads that wait for each other take the cores from the servers beside this one
        settings |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        if tp > 1:
            cores = os.cpu_count() or 1
            settings["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % cores) for rank in range(tp))
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
    """Run a command in a process group of its own, until it ends or our standard input does; then kill the group.

    SGLang's processes stay in the group of the server; it needs no gentler end, since nothing of it is kept.
    """
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    sys.stdout.write(f"{server.pid}\n")
    sys.stdout.flush()
    try:
        while server.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
            if readable and not sys.stdin.buffer.read1(1):
                break
    finally:
        _kill_group(server.pid)


if __name__ == "__main__":
    _supervise(sys.argv[1:])
