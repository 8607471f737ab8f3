"""The guard of one rank's worker: no token from weights that are not known to be one checkpoint, whoever resumes the engine.

Armed before an abort is tried, disarmed by a commit or by the proof that nothing was touched.
"""

from __future__ import annotations

import logging
from typing import Any

from ckpt_core.contract import AbortOutcome, Update
from ckpt_core.errors import EngineError
from ckpt_core.per_worker import PerWorker

_log = logging.getLogger(__name__)
_guarded: PerWorker[bool] = PerWorker()  # whose guard an update armed and none has disarmed since


class Guard:
    """Of one worker, through its plugin's hooks."""

    def __init__(self, worker: Any, hook: Any, *, rank: int) -> None:
        self._worker = worker
        self._hook = hook
        self._rank = rank

    @property
    def armed(self) -> bool:
        """Whether an update armed it and none has disarmed it since."""
        return _guarded.get(self._worker) is not None

    def disarm(self) -> None:
        """The weights are one checkpoint."""
        self._hook.ckpt_poison(worker=self._worker, cause=None)
        _guarded.pop(self._worker)

    def abort(self, update: Update, cause: str, *, wrote: bool) -> AbortOutcome:
        """Arm, and undo what the plugin can.

        Args:
            wrote: live weights were written past the plugin.
        """
        before = self.armed
        armed = self._arm(cause)
        try:
            outcome = self._hook.ckpt_abort(worker=self._worker, update=update, cause=cause)
            if not isinstance(outcome, AbortOutcome):
                raise EngineError(f"ckpt_abort must return an AbortOutcome, got {outcome!r}")
            if outcome is AbortOutcome.UNTOUCHED and wrote:
                outcome = AbortOutcome.RELOADABLE  # the plugin does not know of what was written past it
            if outcome is AbortOutcome.UNTOUCHED and not before:
                self.disarm()
                return outcome
        except Exception:  # noqa: BLE001 POISONED is the answer to any failure here
            _log.exception("abort failed; the weights of rank %d are not known to be any checkpoint", self._rank)
            return AbortOutcome.POISONED
        if outcome is AbortOutcome.UNTOUCHED:
            return AbortOutcome.POISONED  # by this update, yes: the mixed weights of an earlier one are still there
        return outcome if armed else AbortOutcome.POISONED

    def _arm(self, cause: str) -> bool:
        """Where that fails, the engine must still be aborted."""
        _guarded.put(self._worker, True, for_good=True)
        try:
            self._hook.ckpt_poison(worker=self._worker, cause=cause)
        except Exception:  # noqa: BLE001 POISONED is the answer to that, above
            _log.exception("the poison guard of rank %d could not be armed", self._rank)
            return False
        return True
