"""Workers with one bug each that shows in a real update, and seldom before."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ckpt_conformance.reference.worker import Snapshot, Worker
from ckpt_core.contract import AbortOutcome, AttachResult, LoadReport, Rendezvous, Update
from ckpt_core.errors import EngineStateError
from ckpt_core.plugins import EnginePlugin

Tensors = Sequence[tuple[str, torch.Tensor]]
_PATIENCE_S = 1.0
_HANGS_S = 30.0  # longer than anybody waits for a rank's last words


class AttachesATwin(Worker):
    """The attach call enters the loop with another worker than the one that serves."""

    def attach(self, rendezvous: Rendezvous, plugin: EnginePlugin | None = None) -> AttachResult:
        """A copy of this one."""
        return Worker.attach(copy.deepcopy(self), rendezvous, plugin)


class OneControllerOnly(Worker):
    """The first controller's address is the only one for ever."""

    _address = ""

    def attach(self, rendezvous: Rendezvous, plugin: EnginePlugin | None = None) -> AttachResult:
        """Refuse all others."""
        self._address = self._address or rendezvous.address
        if rendezvous.address != self._address:
            raise EngineStateError(f"expected the controller at {self._address}, got {rendezvous.address}")
        return super().attach(rendezvous, plugin)


class OwnPatience(Worker):
    """How long a controller may be silent is a constant of the plugin's own."""

    def attach(self, rendezvous: Rendezvous, plugin: EnginePlugin | None = None) -> AttachResult:
        """Longer than asked."""
        return super().attach(replace(rendezvous, silence_timeout_s=_HANGS_S), plugin)


class Watchdog(Worker):
    """An update that has nothing to do for a moment is taken for abandoned."""

    _last_s = 0.0

    def begin_update(self, update: Update) -> None:
        """Start the clock."""
        super().begin_update(update)
        self._last_s = time.monotonic()

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """In time only."""
        if time.monotonic() - self._last_s > _PATIENCE_S:
            raise EngineStateError(f"update {update.update_id} was abandoned")
        self._last_s = time.monotonic()
        return super().load(update, tensors)


class FinishedIsCommitted(Worker):
    """Weights that are whole are taken for committed: neither an abort nor the guard means anything after finish."""

    _whole = False

    def begin_update(self, update: Update) -> None:
        """Not whole."""
        super().begin_update(update)
        self._whole = False

    def finish_update(self, update: Update) -> None:
        """Whole."""
        super().finish_update(update)
        self._whole = True

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """The right word, and nothing behind it."""
        return AbortOutcome.RELOADABLE if self._whole else super().abort_update(update, cause)

    def set_poison(self, cause: str | None) -> None:
        """Not where it is whole."""
        if cause is None or not self._whole:
            self._whole = self._whole and cause is not None
            super().set_poison(cause)


class HangsOnPeerLoss(Worker):
    """Abort waits for a lost peer to come back."""

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """It will not."""
        if " died " in cause:
            threading.Event().wait(_HANGS_S)
        return super().abort_update(update, cause)


class NormsAreOffsets(Worker):
    """Finish takes replayed norms for not yet processed, and scales them."""

    def finish_update(self, update: Update) -> None:
        """Once more than the loader does."""
        super().finish_update(update)
        if "model.norm.weight" in update.replayed:
            self.model.model.norm.tensor("weight").data.mul_(2)


class SnapshotInPart(Worker):
    """A snapshot holds the layers, and not the norm behind them."""

    def snapshot(self) -> Snapshot:
        """Without it."""
        return {name: tensor for name, tensor in super().snapshot().items() if name != "model.norm.weight"}

    def restore(self, snapshot: Snapshot) -> None:
        """What there is."""
        super().restore({**super().snapshot(), **snapshot})
