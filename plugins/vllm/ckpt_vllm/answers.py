"""Answers of a vLLM server while they are made: token in, token out, and which weights made which; see `compat.has_token_route`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import httpx

from ckpt_conformance.streams import Refused, Told, events, spans_of

# an event for every token would keep the server busy long after the engine is done
SERVER_OPTIONS = ("--enable-scale-out", "--stream-interval=20")
_PATH = "/inference/v1/generate"


def stream(client: httpx.Client, prompt: Sequence[int], max_tokens: int, *, wait_s: float = 60.0) -> Iterator[Told]:
    """Greedy, end tokens ignored; versions come with the last event.

    Args:
        client: of a server that was started with SERVER_OPTIONS.
        wait_s: longest wait for the next event.

    Raises:
        Refused: no whole answer came.
    """
    sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body = {"token_ids": list(prompt), "sampling_params": sampling, "stream": True}
    reason = None
    for event in events(client, _PATH, body, wait_s=wait_s):
        for choice in event["choices"]:
            reason = choice["finish_reason"]
            yield Told(
                token_ids=choice["token_ids"] or (),
                spans=spans_of(choice.get("weight_versions")) if reason else (),
                aborted=reason == "abort",
            )
    if reason is None:
        raise Refused("the stream ended without a reason")
