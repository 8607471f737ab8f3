"""What any client may do with a running server: stream greedy tokens, and resume it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import httpx

from ckpt_conformance.streams import Span, Told
from ckpt_core.endpoint import KEPT_ALIVE

CONTEXT_LENGTH = 2700
_WAIT_S = 120.0
_CONTROL_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response; `aborted` where the server ended it early."""

    token_ids: list[int]
    spans: tuple[Span, ...]
    aborted: bool


class Client(ABC):
    """Of one server.

    Attributes:
        long_answers: by TP size, tokens of an answer that takes the engine some seconds with a tiny model.
        starts_at_once: servers that start together without getting into each other's way on two cores.
    """

    long_answers: ClassVar[Mapping[int, int]]
    starts_at_once: int
    resume_path: str

    @classmethod
    @abstractmethod
    def server_options(cls) -> tuple[str, ...]:
        """Arguments that make a server of this engine report versions, and hold CONTEXT_LENGTH tokens."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=_WAIT_S, limits=KEPT_ALIVE)

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        wait_s: float = _WAIT_S,
        on_token: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Greedy, end tokens ignored.

        Args:
            wait_s: longest wait for the next token.
            on_token: called whenever some came.

        Raises:
            Refused: no whole answer came.
        """
        tokens: list[int] = []
        last = Told()
        for last in self.stream(prompt, max_tokens, wait_s):
            tokens += last.token_ids
            if tokens:
                on_token()
        return Answer(token_ids=tokens, spans=last.spans, aborted=last.aborted)

    def resume(self) -> int:
        """Let a paused server go on, as any client can; the status of the answer."""
        return self._http.post(self.resume_path, json={}, timeout=_CONTROL_S).status_code

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @abstractmethod
    def stream(self, prompt: Sequence[int], max_tokens: int, wait_s: float) -> Iterator[Told]:
        """What the server says; see the engine's `answers`."""


class VllmClient(Client):
    """Token in, token out."""

    long_answers: ClassVar[Mapping[int, int]] = {1: 2500, 2: 1000}
    starts_at_once = 3
    resume_path = "/resume"

    @classmethod
    def server_options(cls) -> tuple[str, ...]:
        """See Client."""
        from ckpt_vllm import answers

        return (*answers.SERVER_OPTIONS, f"--max-model-len={CONTEXT_LENGTH}")

    def stream(self, prompt: Sequence[int], max_tokens: int, wait_s: float) -> Iterator[Told]:
        """See Client."""
        from ckpt_vllm import answers

        return answers.stream(self._http, prompt, max_tokens, wait_s=wait_s)


class SglangClient(Client):
    """SGLang's own route."""

    long_answers: ClassVar[Mapping[int, int]] = {1: 1000, 2: 150}
    starts_at_once = 2
    resume_path = "/continue_generation"

    @classmethod
    def server_options(cls) -> tuple[str, ...]:
        """See Client."""
        # idle servers take whole cores if they may not sleep
        return (
            f"--context-length={CONTEXT_LENGTH}",
            f"--max-total-tokens={4 * CONTEXT_LENGTH}",
            "--sleep-on-idle",
        )

    def stream(self, prompt: Sequence[int], max_tokens: int, wait_s: float) -> Iterator[Told]:
        """See Client."""
        from ckpt_sglang import answers

        return answers.stream(self._http, prompt, max_tokens, wait_s=wait_s)


CLIENTS: dict[str, type[Client]] = {"vllm": VllmClient, "sglang": SglangClient}
