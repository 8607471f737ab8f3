"""Answers of servers that are told while they are made: tokens, and the versions of the weights that made them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


class Refused(Exception):
    """No answer: an error status, an error in the stream, or nothing for as long as the client waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens [start, end) of an answer were made by the weights of that version."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a server says at once of an answer.

    Attributes:
        token_ids: that came since it spoke last.
        spans: of the answer so far, as far as the server tells versions; some tell them with the end only.
        aborted: the server ends the answer early.
    """

    token_ids: Sequence[int] = ()
    spans: tuple[Span, ...] = ()
    aborted: bool = False


def spans_of(given: Sequence[dict[str, Any]] | None) -> tuple[Span, ...]:
    """From `version`, `start` and `end` in JSON, as vLLM and SGLang have them."""
    return tuple(Span(version=span["version"], start=span["start"], end=span["end"]) for span in given or ())


def events(client: httpx.Client, path: str, body: dict[str, Any], *, wait_s: float) -> Iterator[dict[str, Any]]:
    """Server-sent events of a POST, each a JSON object.

    Args:
        wait_s: longest wait for the next one.

    Raises:
        Refused: see there.
    """
    try:
        with client.stream("POST", path, json=body, timeout=wait_s) as response:
            if response.is_error:
                raise Refused(f"{response.status_code}: {response.read().decode(errors='replace')[:300]}")
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data in (line, "[DONE]"):
                    continue
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise Refused(str(event["error"])[:300])
                yield event
    except httpx.HTTPError as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
