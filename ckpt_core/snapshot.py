"""A copy of one rank's live weights, taken before an update and written back, bit for bit, where that fails."""

from __future__ import annotations

import logging
from typing import Any

from ckpt_core.contract import AbortOutcome, Update
from ckpt_core.guard import Guard
from ckpt_core.verify import fingerprint

_log = logging.getLogger(__name__)


class RankSnapshot:
    """Taken when it is made, by the plugin's hooks.

    Args:
        guard: of the worker. Of weights that are mixed already nothing is worth going back to.
    """

    def __init__(self, worker: Any, hook: Any, update: Update, guard: Guard) -> None:
        self._worker = worker
        self._hook = hook
        self._update = update
        self._guard = guard
        self._worth = not guard.armed
        self._fingerprint = self._now() if self._worth else ""
        self._snapshot = hook.ckpt_snapshot(worker=worker, update=update) if self._worth else None

    def put_back(self, outcome: AbortOutcome) -> AbortOutcome:
        """After an abort with that outcome: RESTORED where the weights are again what they were, proved by their fingerprint."""
        if outcome is not AbortOutcome.RELOADABLE or not self._worth:
            return outcome
        try:
            self._hook.ckpt_restore(worker=self._worker, update=self._update, snapshot=self._snapshot)
            if self._now() != self._fingerprint:
                _log.error("the weights are not what they were after the snapshot was written back")
                return outcome
            self._guard.disarm()
        except Exception:  # noqa: BLE001 as it was without a snapshot
            _log.exception("the snapshot could not be written back")
            return outcome
        return AbortOutcome.RESTORED

    def _now(self) -> str:
        live = self._hook.ckpt_live(worker=self._worker)
        return fingerprint(live) if live is not None else ""
