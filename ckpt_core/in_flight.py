"""Requests in flight at a pause: what becomes of them, and which version made their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ckpt_core.contract import PauseMode


class Fate(Enum):
    """What an update did to requests in flight, and so which weights made their tokens."""

    ENDED = "ended early: old version only"
    FINISHED = "finished before the update: old version only"
    KEPT = "went on with their cache: old version up to the pause, new version after it"
    RECOMPUTED = "went on, their cache computed again: old version up to the pause, new version after it"


FATE_IN = {
    PauseMode.ABORT: Fate.ENDED,
    PauseMode.WAIT: Fate.FINISHED,
    PauseMode.KEEP: Fate.KEPT,
    PauseMode.IN_PLACE: Fate.KEPT,
    PauseMode.RETRACT: Fate.RECOMPUTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """The requests that the pause met on one engine.

    Attributes:
        requests: how many, counted at the pause; None where the engine does not tell or was not serving.
        old_version, new_version: which made their tokens, as `fate` says. An empty one was not told by the engine.
    """

    endpoint: str
    engine: str
    requests: int | None
    fate: Fate
    old_version: str
    new_version: str
