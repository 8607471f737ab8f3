"""Answers of an SGLang server as they are made: token in, token out, and which weights made which token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from ckpt_conformance.streams import Refused, Span, Told, events, spans_of

_PATH = "/generate"


def stream(client: httpx.Client, prompt: Sequence[int], max_tokens: int, *, wait_s: float = 60.0) -> Iterator[Told]:
    """Greedy, end tokens ignored; versions come with the last event.

    Args:
        wait_s: longest wait for the next event.

    Raises:
        Refused: no whole answer came.
    """
    sampling = {"max_new_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
    count, reason = 0, None
    for event in events(client, _PATH, body, wait_s=wait_s):
        new = (event.get("output_ids") or ())[count:]  # all so far; the one that ends an aborted answer may tell none
        count += len(new)
        reason = event["meta_info"]["finish_reason"]
        aborted = bool(reason) and reason["type"] == "abort"
        spans = _spans(event["meta_info"], count, aborted=aborted) if reason else ()
        yield Told(token_ids=new, spans=spans, aborted=aborted)
    if reason is None:
        raise Refused("the stream ended without a reason")


def _spans(facts: dict[str, Any], count: int, *, aborted: bool) -> tuple[Span, ...]:
    found = spans_of(facts.get("weight_versions"))
    if found or not (aborted and count):
        return found
    return (Span(version=facts["weight_version"], start=0, end=count),)
