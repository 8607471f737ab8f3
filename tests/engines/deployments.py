"""Servers of real engines, one kind at a time, and what can be seen of them from outside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cases import SHORT, Case, Checkpoints, Fresh, make_checkpoints
from engine_clients import CLIENTS, Client

from ckpt_conformance.streams import Refused
from ckpt_core import Outcome, plugins
from ckpt_core.contract import EndpointState, EndpointStatus
from ckpt_core.endpoint import Endpoint

_LAUNCHERS = {"vllm": ("ckpt_vllm.launch", "VllmServer"), "sglang": ("ckpt_sglang.launch", "SglangServer")}
_CACHE = Path(__file__).parents[2] / ".cache"
_NO_TOKEN_S = 4.0
INSTALLED = [
    name for name in _LAUNCHERS if name in plugins.names() and plugins.load(name).info.engine_version is not None
]


@dataclass(slots=True, kw_only=True)
class Deployment:
    """A server, and what fresh starts on A and B say.

    Attributes:
        babble: its tokens before any update: of dummy weights, or those of A.
    """

    engine: str
    case: Case
    server: Any
    client: Client
    checkpoints: Checkpoints
    fresh: Fresh
    babble: list[list[int]]

    @property
    def url(self) -> str:
        """Of the server."""
        return str(self.server.url)

    def answers(self) -> list[list[int]]:
        """Greedy tokens now, one list a prompt, as long as the fresh ones."""
        return answers_of(self.client, self.case, self.checkpoints)

    def says(self) -> list[list[int]] | None:
        """The first tokens of every answer, or None where the server gives none in reasonable time."""
        found: list[list[int]] = []
        came: list[bool] = []  # a token counts also where the answer then breaks off
        for prompt in self.checkpoints.prompts:
            try:
                answer = self.client.generate(prompt, SHORT, wait_s=_NO_TOKEN_S, on_token=lambda: came.append(True))
            except Refused:
                break
            found.append(answer.token_ids)
        return found if came else None

    def assert_gives_no_token(self) -> None:
        """Poisoned and not dead, whoever resumes it."""
        assert self.status().state is EndpointState.POISONED
        for _ in range(2):
            self.client.resume()  # refused or not: what counts is what comes out
            assert self.says() is None
            assert self.status().state is EndpointState.POISONED

    def assert_old_tokens_or_none(self, outcome: Outcome, which: str) -> None:
        """CLEAN and RESTORED are the old weights at once, POISONED no token."""
        if outcome is Outcome.POISONED:
            self.assert_gives_no_token()
            return
        assert outcome in (Outcome.CLEAN, Outcome.RESTORED)
        assert self.says() == self.fresh.short(which)
        assert self.status().state is EndpointState.SERVING

    def status(self) -> EndpointStatus:
        """As the plugin sees it."""
        endpoint = Endpoint(url=self.url, engine=self.engine)
        try:
            status: EndpointStatus = plugins.load(self.engine).hook.ckpt_ready(endpoint=endpoint)
            return status
        finally:
            endpoint.close()


class Fleet:
    """Starts deployments, one after the other."""

    def __init__(self, engine: str, directory: Path) -> None:
        self._engine = engine
        self._directory = directory
        self._checkpoints: dict[str, Checkpoints] = {}
        self._current: Deployment | None = None
        self._running = ExitStack()

    def get(self, case: Case) -> Deployment:
        """The deployment of a case; ends the one before."""
        if self._current is None or self._current.case != case:
            self.close()
            self._current = self._start(case)
        return self._current

    def log(self) -> str:
        """What the running server wrote so far."""
        return str(self._current.server.log()) if self._current is not None else ""

    def close(self) -> None:
        """End what runs."""
        self._current = None
        self._running.close()

    def _start(self, case: Case) -> Deployment:
        """Two servers or three; the fresh ones end when they have told their tokens."""
        if case.model not in self._checkpoints:
            self._checkpoints[case.model] = make_checkpoints(case.model, self._directory / case.model, _CACHE)
        checkpoints = self._checkpoints[case.model]
        with ThreadPoolExecutor(CLIENTS[self._engine].starts_at_once) as threads, ExitStack() as stack:
            ends = {which: stack.enter_context(ExitStack()) for which in ("ab" if case.empty else "b")}
            fresh = {
                which: threads.submit(self._server, checkpoints[which], case, "auto", end)
                for which, end in ends.items()
            }
            load_format = "dummy" if case.empty else "auto"
            live = threads.submit(self._server, checkpoints.a, case, load_format, stack.enter_context(ExitStack()))
            tokens = {}
            for which, started in fresh.items():
                tokens[which] = answers_of(started.result()[1], case, checkpoints)
                ends[which].close()
            server, client = live.result()
            self._running = stack.pop_all()
        babble = answers_of(client, case, checkpoints)
        return Deployment(
            engine=self._engine,
            case=case,
            server=server,
            client=client,
            checkpoints=checkpoints,
            fresh=Fresh(tokens={"a": babble, **tokens}),
            babble=babble,
        )

    def _server(self, checkpoint: Path, case: Case, load_format: str, stack: ExitStack) -> tuple[Any, Client]:
        return start_server(self._engine, stack, checkpoint, tp=case.tp, load_format=load_format)


def start_server(engine: str, stack: ExitStack, checkpoint: Path, **options: Any) -> tuple[Any, Client]:
    """A server that ends with the stack, and a client of it."""
    module, name = _LAUNCHERS[engine]
    launcher, kind = getattr(import_module(module), name), CLIENTS[engine]
    server = stack.enter_context(launcher(checkpoint, extra=kind.server_options(), **options))
    client = kind(server.url)
    stack.callback(client.close)
    return server, client


def answers_of(client: Client, case: Case, checkpoints: Checkpoints) -> list[list[int]]:
    return [client.generate(prompt, case.tokens).token_ids for prompt in checkpoints.prompts]
