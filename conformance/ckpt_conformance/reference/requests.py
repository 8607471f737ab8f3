"""A request and what it becomes: tokens, each with the version of the weights it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a request ended. ERROR: the engine could not go on."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a request: a token, or (`finish` set) the end.

    Attributes:
        token_id: the token; None at the end.
        version: of the weights it came from.
        finish: why it ended.
        error: for people, with FinishReason.ERROR.
    """

    token_id: int | None = None
    version: str = ""
    finish: FinishReason | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens start .. end-1 of the output came from that version."""

    version: str
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence.

    Attributes:
        emit: called with every event, from the engine's thread; must not block.
        token_ids, versions: output so far, and the version of each token.
        prefilled: the ranks hold its keys and values.
        reason: why it ended; None while it goes on.
    """

    request_id: int
    prompt: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int]
    emit: Callable[[Event], None]
    token_ids: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    prefilled: bool = False
    reason: FinishReason | None = None

    @property
    def finished(self) -> bool:
        """Whether the end was emitted."""
        return self.reason is not None

    def take(self, token_id: int, version: str) -> None:
        """Add a token, and end where it is the last."""
        self.token_ids.append(token_id)
        self.versions.append(version)
        self.prefilled = True
        self.emit(Event(token_id=token_id, version=version))
        if token_id in self.eos_token_ids:
            self.finish(FinishReason.STOP)
        elif len(self.token_ids) >= self.max_tokens:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """End it. Once only."""
        if self.reason is None:
            self.reason = reason
            self.emit(Event(finish=reason, error=error))


def version_spans(versions: Sequence[str]) -> list[VersionSpan]:
    """Runs of the same version; together they cover every token once."""
    spans: list[VersionSpan] = []
    for index, version in enumerate(versions):
        start = spans.pop().start if spans and spans[-1].version == version else index
        spans.append(VersionSpan(version=version, start=start, end=index + 1))
    return spans
