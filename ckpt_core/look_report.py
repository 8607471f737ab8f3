"""What a look at live engines found: how much of a version they hold, bit by bit, and what of it could not be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLook:
    """One engine.

    Attributes:
        endpoint, engine: its URL and plugin.
        version, digest: that it was compared with.
        equal_bytes, differing_bytes, unchecked_bytes: of what its ranks take of that version.
        differing, differing_count: tensors that live otherwise: the first few, of at least so many.
        unchecked, unchecked_count: tensors of which nobody can tell from outside: converted, packed, computed.
        fingerprints: of all live weights, by rank.
        as_committed: whether these are those of the commit of that version; None where none were written down.
        notes: why something could not be compared.
    """

    endpoint: str
    engine: str
    version: str
    digest: str
    equal_bytes: int = 0
    differing_bytes: int = 0
    unchecked_bytes: int = 0
    differing: tuple[str, ...] = ()
    differing_count: int = 0
    unchecked: tuple[str, ...] = ()
    unchecked_count: int = 0
    fingerprints: tuple[str, ...] = ()
    as_committed: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def checked_share(self) -> float:
        """Compared bytes, of all that its ranks take."""
        checked = self.equal_bytes + self.differing_bytes
        return checked / (checked + self.unchecked_bytes) if checked else 0.0

    @property
    def equal(self) -> bool:
        """Something could be compared, and nothing differs."""
        same = not self.differing_count and self.as_committed is not False
        return same and (self.equal_bytes > 0 or self.as_committed is True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookReport:
    """One look.

    Attributes:
        engines: in the order of the endpoints.
        seconds: of all; `pause_s` of these engines did not serve.
    """

    engines: tuple[EngineLook, ...]
    seconds: float
    pause_s: float

    @property
    def equal(self) -> bool:
        """Whether every engine is."""
        return all(engine.equal for engine in self.engines)

    def to_json(self) -> bytes:
        """Stable, indented JSON, with what follows from the fields."""
        engines = [_engine(engine) for engine in self.engines]
        found = {"equal": self.equal, "seconds": self.seconds, "pause_s": self.pause_s, "engines": engines}
        return msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"


def _engine(engine: EngineLook) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(engine)
    return fields | {"equal": engine.equal, "checked_share": engine.checked_share}
