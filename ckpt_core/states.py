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


# an attempt that touches nothing ends as POISONED where an earlier one left the engine so
NEXT = {
    SessionState.IDLE: {SessionState.PLANNED},
    SessionState.PLANNED: {SessionState.PAUSED, SessionState.CLEAN, SessionState.POISONED},
    SessionState.PAUSED: {SessionState.ATTACHED, SessionState.CLEAN, SessionState.POISONED},
    SessionState.ATTACHED: {SessionState.LOADING, SessionState.CLEAN, SessionState.POISONED},
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
