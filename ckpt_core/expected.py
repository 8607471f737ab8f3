"""What ranks must hold before they may commit an update that goes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckpt_core.errors import VerificationError
from ckpt_core.store_records import EngineRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A version as it was once committed: its digest, and fingerprints by URL and rank where these were made."""

    digest: str
    fingerprints: Mapping[str, tuple[str, ...]]

    def check(self, found: Iterable[EngineRecord]) -> None:
        """Raise VerificationError where engines hold anything else."""
        for record in found:
            if record.digest != self.digest:
                raise VerificationError(
                    f"expected version {self.digest} in the host pool, got {record.digest}: its files were written since; update "
                    "to another copy of it"
                )
            expected = self.fingerprints.get(record.url, ())
            if any(expected) and any(record.fingerprints) and expected != record.fingerprints:
                raise VerificationError(
                    f"{record.url}: expected live weights of fingerprints {expected}, got {record.fingerprints}; restart it"
                )
