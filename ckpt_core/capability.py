"""What an engine can do: a closed set of capabilities, each with a level and the reason for it.

A test or a session asks for a capability, never for an engine by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Capability(Enum):
    """One thing a plugin may claim. The set is closed: a new member is a change of the contract."""

    PARTIAL_UPDATE = "partial_update"
    RECORDED_LAYOUT = "recorded_layout"
    QUANTIZED = "quantized"
    DRAFT_MODEL = "draft_model"
    TIED_WEIGHTS = "tied_weights"
    LORA = "lora"
    STABLE_ADDRESSES = "stable_addresses"
    SNAPSHOT = "snapshot"
    RELOADABLE_ABORT = "reloadable_abort"
    LIVE_READ = "live_read"
    PAUSE_ABORT = "pause_abort"
    PAUSE_WAIT = "pause_wait"
    PAUSE_KEEP = "pause_keep"
    PAUSE_RETRACT = "pause_retract"
    FLUSH_CACHE = "flush_cache"
    SLEEP = "sleep"
    POISON_GUARD = "poison_guard"
    INITIAL_WEIGHTS = "initial_weights"
    LIVE_VERSION = "live_version"


class Level(Enum):
    """How far a capability goes. NOT_IMPLEMENTED could be built here; UNSUPPORTED cannot, the engine forbids it."""

    FULL = "full"
    VERSIONED = "versioned"
    NOT_IMPLEMENTED = "not_implemented"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """A level with what qualifies it: the engine version it starts at, or the reason why not."""

    level: Level
    detail: str = ""

    @property
    def usable(self) -> bool:
        """Whether a session may rely on it."""
        return self.level in (Level.FULL, Level.VERSIONED)


FULL = Support(level=Level.FULL)
UNKNOWN = Support(level=Level.UNKNOWN)


def versioned(since: str) -> Support:
    """Supported from engine version `since` on."""
    return Support(level=Level.VERSIONED, detail=since)


def not_implemented(reason: str) -> Support:
    """The engine would allow it; the plugin does not do it (yet)."""
    return Support(level=Level.NOT_IMPLEMENTED, detail=reason)


def unsupported(reason: str) -> Support:
    """The engine does not allow it."""
    return Support(level=Level.UNSUPPORTED, detail=reason)
