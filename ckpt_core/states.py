"""Where an attempt to update can stand, and what may follow what."""

from __future__ import annotations

from enum import Enum


class SessionState(Enum):
    """Where an attempt stands."""

    IDLE = "idle"
    PLANNED = "planned"
    PAUSED = "paused"
    ATTACHED = "attached"
    LOADING = "loading"
    VERIFYING = "verifying"
    COMMITTED = "committed"
    CLEAN = "clean"
    RESTORED = "restored"
    POISONED = "poisoned"


NEXT = {
    SessionState.IDLE: {SessionState.PLANNED},
    SessionState.PLANNED: {SessionState.PAUSED, SessionState.CLEAN},
    SessionState.PAUSED: {SessionState.ATTACHED, SessionState.CLEAN},
    SessionState.ATTACHED: {SessionState.LOADING, SessionState.CLEAN},
    SessionState.LOADING: {
        SessionState.VERIFYING,
        SessionState.CLEAN,
        SessionState.RESTORED,
        SessionState.POISONED,
    },
    SessionState.VERIFYING: {
        SessionState.COMMITTED,
        SessionState.CLEAN,
        SessionState.RESTORED,
        SessionState.POISONED,
    },
}
