"""Where an engine that joins takes its weights from, as users say it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_core.p2p.nics import nics_here
from ckpt_core.p2p.offers import Offer, index_of, read_offer
from ckpt_core.p2p.read_plan import planned
from ckpt_core.source import SourceIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Owners of one version.

    Attributes:
        offers: what they export, or the files that `ckpt export` wrote.
        host: address of this host, as they reach it.
        max_bytes_per_s: what is read in all; 0 for no limit.
    """

    offers: Sequence[Offer | str | os.PathLike[str]]
    host: str = "127.0.0.1"
    max_bytes_per_s: float = 0.0

    def index(self) -> SourceIndex:
        """The version, and what each owner should give of it, by the NICs of all.

        Raises:
            ConfigError, ManifestError, VerificationError: see offers; or CKPT_NICS names none that is here.
        """
        offers = [offer if isinstance(offer, Offer) else read_offer(Path(offer)) for offer in self.offers]
        index = index_of(offers, host=self.host, max_bytes_per_s=self.max_bytes_per_s)
        return planned(index, offers, nics_here())
