"""Engines that join a fleet: they get the version that it runs, or is about to run, from whoever has it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from ckpt_core.api import Updater
from ckpt_core.config import UpdateConfig
from ckpt_core.directory_client import DirectoryClient
from ckpt_core.errors import CkptError, EngineUnavailable, PeerLost, UpdateAborted
from ckpt_core.metrics import UpdateReport
from ckpt_core.p2p.peers import Peers
from ckpt_core.session import OnProgress
from ckpt_core.store_records import EngineRecord
from ckpt_core.targets import Target

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.2
_LEASE_ENDS_WITHIN_S = 30.0  # of an owner that died


class Joiner:
    """Keeps agents over several joins of the same engines. A context manager.

    Args:
        targets: engines of this host.
        directory: of the fleet.
        host: address of this host, as owners reach it.
        max_bytes_per_s: what is read in all; 0 for no limit.
        within_s: for how long an update of the fleet, or owners, are waited for.
        config, on_progress: see Updater.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        directory: DirectoryClient,
        *,
        host: str = "127.0.0.1",
        max_bytes_per_s: float = 0.0,
        within_s: float = 600.0,
        config: UpdateConfig | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._urls = {target.url for target in targets}
        self._directory = directory
        self._host, self._max_bytes_per_s = host, max_bytes_per_s
        self._within_s = within_s
        self._updater = Updater(targets, config=config, on_progress=on_progress)

    def __enter__(self) -> Joiner:
        self._updater.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._updater.__exit__(kind, error, trace)

    def join(self, version: str = "") -> UpdateReport:
        """Bring the engines to a version of the fleet.

        Without a version that is what the fleet runs; while it is updated, what that update commits; where no controller tells
        the directory, what was offered last. Where the fleet moved on meanwhile, they follow. Where owners went away, others
        are asked for.

        Args:
            version: digest, label, or beginning of a digest.

        Raises:
            EngineUnavailable: the directory does not answer, or nobody offers that version.
            CkptError, UpdateAborted: see Updater.update.
        """
        deadline = time.monotonic() + self._within_s
        while True:
            wanted = version or self._directory.settled(_left_s(deadline)).digest
            offering, offers = self._directory.offers(wanted, _left_s(deadline))
            peers = Peers(offers=offers, host=self._host, max_bytes_per_s=self._max_bytes_per_s)
            try:
                report = self._updater.update(peers, version=offering.version)
            except (PeerLost, UpdateAborted) as error:
                if not _others_came(error, self._directory, offering.epoch, deadline):
                    raise
                _log.warning("once more, from those that are there now: %s", error)
                continue
            self._tell()
            if version or self._directory.fleet().digest in ("", offering.digest):
                return report
            _log.warning("the fleet moved on from %s meanwhile; following", offering.version)

    def follow(self, ended: threading.Event, on_report: Callable[[UpdateReport], None]) -> None:
        """Join each version that the fleet comes to, until told to end.

        Raises:
            CkptError, UpdateAborted: see `join`; but a directory that is away for a while is waited for.
        """
        epoch, digest = -1, ""
        while not ended.wait(_LOOK_EVERY_S):
            try:
                fleet = self._directory.fleet()
                if fleet.epoch == epoch and fleet.digest == digest:
                    continue
                wanted = fleet.digest or self._directory.newest()
            except EngineUnavailable as error:
                _log.info("nothing to follow: %s", error)
                continue
            epoch, digest = fleet.epoch, fleet.digest
            if wanted not in self._held():
                on_report(self.join())

    def _held(self) -> set[str]:
        return {record.digest for record in self._records()}

    def _records(self) -> list[EngineRecord]:
        return [record for record in self._updater.history.store.engines() if record.url in self._urls]

    def _tell(self) -> None:
        self._directory.joined(self._records())


def _others_came(error: CkptError, directory: DirectoryClient, epoch: int, deadline: float) -> bool:
    """Whether it failed for want of owners, and these are not the same any more."""
    causes = error.causes if isinstance(error, UpdateAborted) else (error,)
    lost = any(isinstance(cause, PeerLost) for cause in causes)
    return lost and directory.changed(epoch, min(_left_s(deadline), _LEASE_ENDS_WITHIN_S))


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
