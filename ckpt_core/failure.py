"""A failure as a message that always can be sent: no lone surrogates, not too long, and no second failure on the way."""

from __future__ import annotations

import traceback

from ckpt_core import wire

_MOST_CHARS = 20_000


def describe(error: BaseException) -> str:
    """Class and text of an error in one sendable line."""
    try:
        text = str(error)
    except Exception as second:  # noqa: BLE001 an error whose text fails is still an error
        text = f"(its text cannot be had: {type(second).__name__})"
    return _sendable(f"{type(error).__name__}: {text}")


def failure_message(error: BaseException, phase: str) -> wire.Failure:
    """What the controller gets to know of an error."""
    name, _, text = describe(error).partition(": ")
    try:
        trace = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 as above
        trace = ""
    return wire.Failure(error=name, message=text, phase=phase, traceback=_sendable(trace))


def _sendable(text: str) -> str:
    return text[-_MOST_CHARS:].encode("utf-8", "replace").decode()
