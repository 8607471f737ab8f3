"""What any client may do with a running server: stream greedy tokens, and resume it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

from ckpt_core.endpoint import KEPT_ALIVE

CONTEXT_LENGTH = 2700
_WAIT_S = 120.0
_CONTROL_S = 20.0


class Refused(Exception):
    """No answer: an error status, an error in the stream, or nothing for as long as the client waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens [start, end) were made by the weights of that version."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response; `aborted` where the server ended it early."""

    token_ids: list[int]
    spans: tuple[Span, ...]
    aborted: bool


class Client(ABC):
    """Of one server.

    Attributes:
        server_options: arguments that make a server of this engine report versions, and hold CONTEXT_LENGTH tokens.
        long_answers: by TP size, tokens of an answer that takes the engine some seconds with a tiny model.
        starts_at_once: servers that start together without getting into each other's way on two cores.
    """

    server_options: tuple[str, ...]
    long_answers: ClassVar[Mapping[int, int]]
    starts_at_once: int
    path: str
    resume_path: str

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
        last: dict[str, Any] = {}
        tokens: list[int] = []
        for last in self._events(self.body(prompt, max_tokens), wait_s):
            tokens = self.tokens(last, tokens)
            if tokens:
                on_token()
        return self.answer(last, tokens)

    def resume(self) -> int:
        """Let a paused server go on, as any client can; the status of the answer."""
        return self._http.post(self.resume_path, json={}, timeout=_CONTROL_S).status_code

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _events(self, body: dict[str, Any], wait_s: float) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", self.path, json=body, timeout=wait_s) as response:
                if response.is_error:
                    raise Refused(f"{response.status_code}: {response.read().decode(errors='replace')[:300]}")
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data in (line, "[DONE]"):
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise Refused(str(event["error"])[:300])
                    yield event
        except httpx.HTTPError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error

    @abstractmethod
    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """Of a streaming request."""

    @abstractmethod
    def tokens(self, event: dict[str, Any], before: list[int]) -> list[int]:
        """All tokens as of this event."""

    @abstractmethod
    def answer(self, event: dict[str, Any], tokens: list[int]) -> Answer:
        """What the last event says of the whole."""


class VllmClient(Client):
    """Token in, token out."""

    # an event for every token keeps the server busy long after the engine is done
    server_options = ("--enable-scale-out", f"--max-model-len={CONTEXT_LENGTH}", "--stream-interval=20")
    long_answers: ClassVar[Mapping[int, int]] = {1: 2500, 2: 1000}
    starts_at_once = 3
    path = "/inference/v1/generate"
    resume_path = "/resume"

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See Client."""
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"token_ids": list(prompt), "sampling_params": sampling, "stream": True}

    def tokens(self, event: dict[str, Any], before: list[int]) -> list[int]:
        """Events tell what is new."""
        return before + [token for choice in event["choices"] for token in choice["token_ids"] or ()]

    def answer(self, event: dict[str, Any], tokens: list[int]) -> Answer:
        """See Client."""
        if not event:
            raise Refused("an empty stream")
        (choice,) = event["choices"]
        if choice["finish_reason"] is None:
            raise Refused(f"the stream ended after {len(tokens)} tokens without a reason")
        return Answer(
            token_ids=tokens,
            spans=_spans(choice["weight_versions"]),
            aborted=choice["finish_reason"] == "abort",
        )


class SglangClient(Client):
    """SGLang's own route."""

    # idle servers take whole cores if they may not sleep
    server_options = (
        f"--context-length={CONTEXT_LENGTH}",
        f"--max-total-tokens={4 * CONTEXT_LENGTH}",
        "--sleep-on-idle",
    )
    long_answers: ClassVar[Mapping[int, int]] = {1: 1000, 2: 150}
    starts_at_once = 2
    path = "/generate"
    resume_path = "/continue_generation"

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See Client."""
        sampling = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}

    def tokens(self, event: dict[str, Any], before: list[int]) -> list[int]:
        """Events tell all so far; the one that ends an aborted request may tell none."""
        return event.get("output_ids") or before

    def answer(self, event: dict[str, Any], tokens: list[int]) -> Answer:
        """See Client."""
        if not event:
            raise Refused("an empty stream")
        facts = event["meta_info"]
        reason = facts["finish_reason"]
        if reason is None:
            raise Refused(f"the stream ended after {len(tokens)} tokens without a reason")
        aborted = reason["type"] == "abort"
        spans = _spans(facts.get("weight_versions"))
        if aborted and not spans and tokens:
            spans = (Span(version=facts["weight_version"], start=0, end=len(tokens)),)
        return Answer(token_ids=tokens, spans=spans, aborted=aborted)


def _spans(given: Sequence[dict[str, Any]] | None) -> tuple[Span, ...]:
    return tuple(Span(**span) for span in given or ())


CLIENTS: dict[str, type[Client]] = {"vllm": VllmClient, "sglang": SglangClient}
