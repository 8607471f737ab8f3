"""Workers with one bug each in the order of hooks, in abort, and in what serves."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
import torch.distributed

from ckpt_conformance.reference.options import TAGS
from ckpt_conformance.reference.worker import Worker
from ckpt_core.contract import AbortOutcome, LoadReport, PauseMode, Update

Tensors = Sequence[tuple[str, torch.Tensor]]


class EagerBegin(Worker):
    """Begin trusts that somebody paused the engine."""

    def check_updatable(self) -> None:
        """Look at everything but the pause."""
        paused, self.paused = self.paused, True
        try:
            super().check_updatable()
        finally:
            self.paused = paused


class LateLoad(Worker):
    """Loading does not look whether any update runs."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load whatever comes while nothing runs; but not for an update that was aborted."""
        aborted = self.mixed_cause is not None
        if self.updating is not None or aborted:
            return super().load(update, tensors)
        self.updating = update
        try:
            return super().load(update, tensors)
        finally:
            self.updating, self.mixed_cause = None, None


class FinishesTwice(Worker):
    """Finish without an update has nothing to do, and does not say so."""

    def finish_update(self, update: Update) -> None:
        """Fine."""
        if self.updating is not None or self.mixed_cause is not None:
            super().finish_update(update)


class LateBuckets(Worker):
    """Buckets of an aborted update are loaded on."""

    _aborted: tuple[str, ...] = ()

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """Remember it."""
        self._aborted = (*self._aborted, update.update_id)
        return super().abort_update(update, cause)

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Past the state."""
        if update.update_id not in self._aborted:
            return super().load(update, tensors)
        return LoadReport(loaded=tuple(sorted(self.model.load_weights(tensors))))


class HalfHonestAbort(Worker):
    """Abort thinks of the second bucket, and of none before it, when it tells whether anything was touched."""

    _buckets = 0

    def begin_update(self, update: Update) -> None:
        """None yet."""
        super().begin_update(update)
        self._buckets = 0

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Count."""
        self._buckets += 1
        return super().load(update, tensors)

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """UNTOUCHED after one bucket."""
        outcome = super().abort_update(update, cause)
        return AbortOutcome.UNTOUCHED if self._buckets == 1 else outcome


class Unparked(Worker):
    """Begin puts the norm somewhere else, finish puts it back, and abort does not."""

    _parked: torch.Tensor | None = None

    def begin_update(self, update: Update) -> None:
        """Park."""
        super().begin_update(update)
        norm = self.model.model.norm.tensor("weight")
        self._parked, norm.data = norm.data, norm.data.clone()

    def finish_update(self, update: Update) -> None:
        """Back to where it was."""
        super().finish_update(update)
        norm = self.model.model.norm.tensor("weight")
        assert self._parked is not None
        norm.data = self._parked.copy_(norm.data)
        self._parked = None


class ForgetfulAbort(Worker):
    """A second abort knows nothing of what the first one found."""

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """Once."""
        outcome = super().abort_update(update, cause)
        self._touched = None
        return outcome


class BackgroundThread(Worker):
    """Every update starts a thread that waits for something."""

    def begin_update(self, update: Update) -> None:
        """And nobody joins it. It ends some time, for the sake of whoever runs this."""
        super().begin_update(update)
        threading.Thread(target=threading.Event().wait, args=(5.0,), name="prefetch", daemon=True).start()


class Barrier(Worker):
    """Abort waits for all ranks, the dead ones too."""

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """Not where there is no process group, as here."""
        with suppress(ValueError):
            torch.distributed.barrier()
        return super().abort_update(update, cause)


class VersionAtFinish(Worker):
    """The version is published when an update has finished, before anybody verified or committed it."""

    def finish_update(self, update: Update) -> None:
        """Too early."""
        super().finish_update(update)
        self.version = update.version


class WakesToServe(Worker):
    """Weights come back from sleep without contents, and serve."""

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        """Without a mark."""
        super().wake(tags)
        self.waiting_cause = None


def deaf_to(mode: PauseMode) -> type[Worker]:
    """A worker that pausing in that mode does not stop."""

    class DeafPause(Worker):
        def pause(self, asked: PauseMode | None = None) -> int:
            return 0 if asked is mode else super().pause(asked or PauseMode.WAIT)

    return DeafPause
