"""Workers with one bug each, in what they do around an update."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ckpt_conformance.checks.failure import InjectedFault
from ckpt_conformance.reference.worker import Snapshot, Worker
from ckpt_core.contract import AbortOutcome, LoadReport, Update

Tensors = Sequence[tuple[str, torch.Tensor]]


class SwallowedFinishError(Worker):
    """What fails in post-processing is forgotten, as after `except Exception: logger.exception(...)`."""

    def finish_update(self, update: Update) -> None:
        """Finished, whatever happened."""
        with suppress(InjectedFault):
            super().finish_update(update)
        self.updating, self.mixed_cause, self._finished = None, None, True


class SwallowedLoadError(Worker):
    """What fails in the loader is forgotten, and reported as loaded."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Loaded, whatever happened."""
        try:
            return super().load(update, tensors)
        except InjectedFault:
            return LoadReport(loaded=tuple(name for name, _ in tensors))


class SkippedLastBucket(Worker):
    """Each bucket is written when the next one comes; nobody thinks of the last. (Not where quantising would notice.)"""

    _waiting: tuple[tuple[str, torch.Tensor], ...] = ()

    def begin_update(self, update: Update) -> None:
        """Nothing waits."""
        super().begin_update(update)
        self._waiting = ()

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Write the bucket before; keep a copy of this one."""
        if self.options.quantise:
            return super().load(update, tensors)
        for name, tensor in tensors:
            self.model.check_weight(name, tensor)
        before, self._waiting = self._waiting, tuple((name, tensor.clone()) for name, tensor in tensors)
        if before:
            super().load(update, before)
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names) & self.model.table.keys()
        return LoadReport(loaded=names)


class KeptView(Worker):
    """Views of the bucket are kept until the update is over."""

    _kept: tuple[Any, ...] = ()

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load, and keep."""
        report = super().load(update, tensors)
        self._kept = (*self._kept, *tensors)
        return report

    def finish_update(self, update: Update) -> None:
        """Too late: the ring was written over long ago."""
        super().finish_update(update)
        self._kept = ()

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """Let go."""
        self._kept = ()
        return super().abort_update(update, cause)


class WrittenBucket(Worker):
    """The bucket is used as scratch memory once it is loaded."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load, then write into the ring."""
        report = super().load(update, tensors)
        for _, tensor in tensors:
            tensor.zero_()
        return report


class WrongSlice(Worker):
    """On a later rank, an update takes the first rank's rows of the fused q, k and v."""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load, with whole q rolled so that the first rows come where this rank looks."""
        rolled = [(name, self._roll(tensor) if name.endswith("q_proj.weight") else tensor) for name, tensor in tensors]
        return super().load(update, rolled)

    def _roll(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(self.rank * tensor.shape[0] // self.tp_size, 0)


class StaleScale(Worker):
    """Updates write the quantised weights and leave the scales of the first start."""

    def finish_update(self, update: Update) -> None:
        """Put the old scales back."""
        scales = {name: t.clone() for name, t in self.model.live_tensors().items() if name.endswith("_scale")}
        super().finish_update(update)
        live = self.model.live_tensors()
        for name, scale in scales.items():
            live[name].copy_(scale)


class ForgottenTiedCopy(Worker):
    """A tied head has a copy of the embedding, which is made at start and never again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.model.config.tied:
            self.model.lm_head = copy.deepcopy(self.model.model.embed_tokens)


class NewStorage(Worker):
    """Finish puts new tensors where the old ones were."""

    def finish_update(self, update: Update) -> None:
        """Replace the storage of every parameter."""
        super().finish_update(update)
        for _, layer in self.model.loadable_layers():
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.clone()


class LyingAbort(Worker):
    """Abort always says that nothing was touched."""

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """UNTOUCHED."""
        super().abort_update(update, cause)
        return AbortOutcome.UNTOUCHED


class StickyFlag(Worker):
    """Abort leaves the worker updating: the next begin is refused for ever."""

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """The flag stays where something was written."""
        running, touched = self.updating, self._touched
        outcome = super().abort_update(update, cause)
        if touched is update:
            self.updating = running
        return outcome


class DoubleBegin(Worker):
    """A second begin takes the first one's place."""

    def check_updatable(self) -> None:
        """Look at everything but the update that runs."""
        running, self.updating = self.updating, None
        try:
            super().check_updatable()
        finally:
            self.updating = running


class SleepyBegin(Worker):
    """Begin does not look whether there are any weights."""

    def check_updatable(self) -> None:
        """Look at everything but sleep."""
        asleep, self.asleep = self.asleep, frozenset()
        try:
            super().check_updatable()
        finally:
            self.asleep = asleep


class DroppedUnknownName(Worker):
    """`if name not in params: continue`"""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load what is known, and do not speak of the rest."""
        known = self.model.table.keys() | self.model.ignored
        return super().load(update, [(name, tensor) for name, tensor in tensors if name in known])


class NobodyCounts(Worker):
    """Finish does not look whether everything came."""

    def finish_update(self, update: Update) -> None:
        """All came."""
        self._arrived |= self.model.table.keys()
        super().finish_update(update)


class PoisonIgnored(Worker):
    """Arming the guard does nothing: the plugin trusts the paused scheduler."""

    def set_poison(self, cause: str | None) -> None:
        """Only disarm."""
        if cause is None:
            super().set_poison(None)


class PoisonClearedByFinish(Worker):
    """Finish disarms the guard, before anybody verified or committed."""

    def finish_update(self, update: Update) -> None:
        """Disarm."""
        super().finish_update(update)
        self.poison_cause = None


class Leak(Worker):
    """Every update leaves a copy of a weight behind."""

    def begin_update(self, update: Update) -> None:
        """Remember."""
        super().begin_update(update)
        self.__dict__.setdefault("history", []).append(self.model.model.embed_tokens.tensor("weight").clone())


class SnapshotOfViews(Worker):
    """A snapshot refers to the live weights instead of holding them."""

    def snapshot(self) -> Snapshot:
        """Views."""
        return {name: live.tensor for name, live in self.live().items()}


class AlreadyThere(Worker):
    """An update to the version that was committed last is taken for done: nothing is written."""

    _last = ""

    def load(self, update: Update, tensors: Tensors) -> LoadReport:
        """Load, unless it is the last version again."""
        if update.version != self._last:
            return super().load(update, tensors)
        self._check_running(update)
        names = tuple(name for name, _ in tensors)
        self._arrived |= set(names)
        return LoadReport(loaded=names)

    def finish_update(self, update: Update) -> None:
        """Remember the version."""
        super().finish_update(update)
        self._last = update.version


class StaleCache(Worker):
    """Flushing the cache does nothing."""

    def flush_cache(self) -> None:
        """Nothing."""


class VersionNotTold(Worker):
    """The version that was committed is never told."""

    def resume(self, version: str | None = None) -> None:
        """Without it."""
        super().resume(None)

    def set_poison(self, cause: str | None) -> None:
        """Keep the old label."""
        version = self.version
        super().set_poison(cause)
        self.version = version


class WaitForgotten(Worker):
    """A worker that waits for its first weights serves its dummy ones."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waiting_cause = None
