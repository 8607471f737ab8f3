"""Engines that join a fleet: they get the version that it runs, or is about to run, from whoever has it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ckpt_core.api import Updater
from ckpt_core.config import UpdateConfig
from ckpt_core.directory_client import DirectoryClient
from ckpt_core.errors import CkptError, PeerLost, UpdateAborted
from ckpt_core.metrics import UpdateReport
from ckpt_core.p2p.peers import Peers
from ckpt_core.session import OnProgress
from ckpt_core.targets import Target

_log = logging.getLogger(__name__)
_LEASE_ENDS_WITHIN_S = 30.0  # of an owner that died


def join(
    targets: Sequence[Target],
    directory: DirectoryClient,
    *,
    version: str = "",
    host: str = "127.0.0.1",
    max_bytes_per_s: float = 0.0,
    within_s: float = 600.0,
    config: UpdateConfig | None = None,
    on_progress: OnProgress | None = None,
) -> UpdateReport:
    """Bring engines to a version of the fleet.

    Without a version that is what the fleet runs; while it is updated, what that update commits. Where the fleet moved on
    meanwhile, they follow. Where owners went away, others are asked for.

    Args:
        version: digest, label, or beginning of a digest.
        host: address of this host, as owners reach it.
        max_bytes_per_s: what is read in all; 0 for no limit.
        within_s: for how long an update of the fleet, or owners, are waited for.

    Raises:
        EngineUnavailable: the directory does not answer, or nobody offers that version.
        CkptError, UpdateAborted: see Updater.update.
    """
    deadline = time.monotonic() + within_s
    with Updater(targets, config=config, on_progress=on_progress) as updater:
        while True:
            wanted = version or directory.settled(_left_s(deadline)).digest
            offering, offers = directory.offers(wanted, _left_s(deadline))
            peers = Peers(offers=offers, host=host, max_bytes_per_s=max_bytes_per_s)
            try:
                report = updater.update(peers, version=offering.version)
            except (PeerLost, UpdateAborted) as error:
                if not _others_came(error, directory, offering.epoch, deadline):
                    raise
                _log.warning("once more, from those that are there now: %s", error)
                continue
            urls = {target.url for target in targets}
            directory.joined([record for record in updater.history.store.engines() if record.url in urls])
            if version or directory.fleet().digest in ("", offering.digest):
                return report
            _log.warning("the fleet moved on from %s meanwhile; following", offering.version)


def _others_came(error: CkptError, directory: DirectoryClient, epoch: int, deadline: float) -> bool:
    """Whether it failed for want of owners, and these are not the same any more."""
    causes = error.causes if isinstance(error, UpdateAborted) else (error,)
    lost = any(isinstance(cause, PeerLost) for cause in causes)
    return lost and directory.changed(epoch, min(_left_s(deadline), _LEASE_ENDS_WITHIN_S))


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
