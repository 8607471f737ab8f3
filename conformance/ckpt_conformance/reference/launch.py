"""Start a reference engine as a process of its own, for tests, the demo and the conformance suite."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

from ckpt_core.config import child_environment
from ckpt_core.endpoint import KEPT_ALIVE
from ckpt_core.errors import EngineUnavailable

_STOP_TIMEOUT_S = 15.0


class ReferenceServer:
    """A running engine; a context manager that leaves nothing behind.

    Also when this process is killed: the server ends with its standard input, the ranks with the server.

    Args:
        prefix: command that runs it, such as `ip netns exec NAME`.

    Attributes:
        url: where it serves.
        pid: of the server.
        rank_pids: by rank.
        instance_id: see contract.RankInfo.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        tp: int = 1,
        load_format: str = "auto",
        quantize: str = "none",
        wait_for_weights: bool = False,
        bearer_token: str = "",
        version: str = "",
        extra: Sequence[str] = (),
        start_timeout_s: float = 90.0,
        prefix: Sequence[str] = (),
    ) -> None:
        self._prefix = tuple(prefix)
        self._arguments = [
            str(model_dir),
            f"--tp={tp}",
            f"--load-format={load_format}",
            f"--quantize={quantize}",
            f"--bearer-token={bearer_token}",
            f"--version={version}",
            *(["--wait-for-weights"] if wait_for_weights else []),
            *extra,
        ]
        self._bearer_token = bearer_token
        self._start_timeout_s = start_timeout_s
        self._stack = ExitStack()
        self.url, self.instance_id = "", ""
        self.pid, self.rank_pids = 0, tuple[int, ...]()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the server and its ranks."""
        return (self.pid, *self.rank_pids)

    def __enter__(self) -> ReferenceServer:
        """Start it and wait until it is ready.

        Raises:
            EngineUnavailable: it ended or was not ready in time; with the end of its log.
        """
        with ExitStack() as stack:
            self._log: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [
                    *self._prefix,
                    sys.executable,
                    "-m",
                    "ckpt_conformance.reference",
                    "--exit-with-stdin",
                    *self._arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=child_environment(),
            )
            stack.callback(self._stop)
            ready = json.loads(self._ready_line())
            self.url, self.pid, self.instance_id = ready["url"], ready["pid"], ready["instance_id"]
            self.rank_pids = tuple(ready["rank_pids"])
            headers = {"Authorization": f"Bearer {self._bearer_token}"} if self._bearer_token else {}
            client = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=60.0, limits=KEPT_ALIVE)
            self.client = stack.enter_context(client)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._stack.close()

    def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 16, *, ignore_eos: bool = False
    ) -> dict[str, Any]:
        """Answer of POST /generate.

        Raises:
            httpx.HTTPStatusError: any other status than 200.
        """
        response = self.client.post("/generate", json=_body(prompt, max_tokens, ignore_eos, stream=False))
        return dict(response.raise_for_status().json())

    def stream(
        self, prompt: str | Sequence[int], max_tokens: int = 16, *, ignore_eos: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Events of POST /generate with stream: tokens, then the whole answer."""
        body = _body(prompt, max_tokens, ignore_eos, stream=True)
        with self.client.stream("POST", "/generate", json=body) as response:
            if response.is_error:
                response.read()
                response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def post(self, path: str, **params: str) -> httpx.Response:
        """A control call, whatever its status."""
        return self.client.post(path, params=params)

    def status(self) -> dict[str, Any]:
        """Answer of GET /status."""
        return dict(self.client.get("/status").raise_for_status().json())

    def live_digests(self) -> list[dict[str, str]]:
        """Digest of every live tensor, by rank and name."""
        return list(self.client.get("/live_digests").raise_for_status().json()["ranks"])

    def log(self) -> str:
        """What the server and its ranks wrote to standard error so far."""
        size_bytes = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size_bytes, 0).decode(errors="replace")

    def _ready_line(self) -> bytes:
        deadline = time.monotonic() + self._start_timeout_s
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], deadline - time.monotonic())
        line = self._process.stdout.readline() if readable else b""
        if not line:
            why = "ended" if readable else f"was not ready within {self._start_timeout_s:g} s"
            raise EngineUnavailable(f"the reference engine {why}; its log ends: {self.log()[-2000:]}")
        return line

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate(timeout=_STOP_TIMEOUT_S)


def _body(prompt: str | Sequence[int], max_tokens: int, ignore_eos: bool, *, stream: bool) -> dict[str, Any]:
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    value = prompt if isinstance(prompt, str) else list(prompt)
    return {key: value, "max_tokens": max_tokens, "ignore_eos": ignore_eos, "stream": stream}
