"""One rank of TensorRT-LLM as `ckpt_core.worker` sees it: its model, its guard, and the update it is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import (
    AbortOutcome,
    LiveState,
    LiveTensor,
    LoadBucket,
    LoadReport,
    Update,
)
from ckpt_core.errors import CoverageError, EngineStateError
from ckpt_trtllm import compat
from ckpt_trtllm.cycle import Cycle
from ckpt_trtllm.guard import Guard
from ckpt_trtllm.hold import Hold
from ckpt_trtllm.identity import Identity
from ckpt_trtllm.landing import Landing
from ckpt_trtllm.started import Started
from ckpt_trtllm.storage import Storage
from ckpt_trtllm.support import check_interface, check_supported, check_whole_modules

if TYPE_CHECKING:
    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest

_ATTRIBUTE = "_ckpt_rank"
_NAMES_SHOWN = 8


class Phase(Enum):
    """Where an update of this rank stands."""

    LOADING = "loading"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class _Progress:
    """One update of this rank, with the names that came."""

    update: Update
    cycle: Cycle
    phase: Phase = Phase.LOADING
    arrived: set[str] = field(default_factory=set)


class TrtllmRank:
    """See the module. One per worker, for its whole life: `rank_of` makes it.

    Attributes:
        worker: TensorRT-LLM's.
        features: what its engine has.
        identity: who it is.
        guard, hold: see there.
        version: of the last commit, or what the control side says; empty before.
        met: requests in flight when the executor was parked last; None where it does not tell.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.features = compat.features_of(worker)
        check_interface(self.features)
        self.identity = Identity(worker)
        self.rank = self.identity.rank
        self.guard = Guard(worker.engine.model_engine, rank=self.rank)
        self.hold = Hold(worker.engine, drain_option=self.features.drain_option)
        self.version = ""
        self.met: int | None = None
        model = compat.model_of(worker)
        self._landing = Landing([path for path, _ in model.named_modules()], compat.fused_parts(worker))
        self._started = Started(compat.model_directory(worker), tied=compat.is_tied(model), rank=self.rank)
        self._storage = Storage()
        self._progress: _Progress | None = None
        self._last: tuple[str, AbortOutcome] | None = None
        self._mixed = ""  # the update that wrote a part and was not committed; cleared by the commit of a whole one

    @property
    def model(self) -> Any:
        """The target model."""
        return compat.model_of(self.worker)

    # -- what may be refused ---------------------------------------------------------------------------------------
    def check_updatable(self) -> None:
        """Raise where no update can begin now, or ever.

        Raises:
            EngineStateError: with the reason; nothing was changed.
        """
        if self._progress is not None:
            raise EngineStateError(
                f"rank {self.rank} is in update {self._progress.update.update_id}; end or abort it first"
            )
        check_supported(self.worker, self.features, rank=self.rank)

    def layout(self, manifest: Manifest) -> Layout:
        """What this rank needs of a checkpoint. Touches nothing."""
        return self._started.layout(manifest, self._landing)

    # -- an update -------------------------------------------------------------------------------------------------
    def begin(self, update: Update) -> None:
        """Nothing is written yet: modules are rebuilt at the first bucket.

        Raises:
            EngineStateError: not now, or not this update; nothing was changed.
        """
        self.check_updatable()
        self.hold.check(self.rank)
        if update.partial and self._mixed:
            raise EngineStateError(f"rank {self.rank}: {self._mixed}; a part cannot mend that: send a whole checkpoint")
        landings = self._landings(update) if update.partial else None
        self._last = None
        self._progress = _Progress(
            update=update, cycle=Cycle(self.worker, self.features, self._storage, landings and tuple(landings))
        )
        self.guard.uncommitted = f"update {update.update_id} is not committed"

    def load(self, update: Update, bucket: LoadBucket) -> LoadReport:
        """Through the engine's own loader.

        Raises:
            EngineStateError: that update does not load here.
            CoverageError: a tensor came before; nothing of this bucket was written.
        """
        progress = self._in(update, Phase.LOADING)
        wanted = self._started.tensors
        ignored = tuple(item.name for item in bucket.tensors if item.name not in wanted)
        tensors = [(name, tensor) for name, tensor in bucket.named_tensors() if name in wanted]
        self._check_new(progress, [name for name, _ in tensors])
        if tensors:
            self._mixed = f"update {update.update_id} wrote a part of the weights and was not committed"
            progress.cycle.load(tensors)
            self.identity.synchronise()
        progress.arrived.update(name for name, _ in tensors)
        return LoadReport(
            loaded=tuple(name for name, _ in tensors), ignored=ignored, retained_bytes=progress.cycle.retained_bytes
        )

    def finish(self, update: Update) -> None:
        """Process, and wait for the device.

        Raises:
            EngineStateError: that update does not load here.
            CoverageError: an expected tensor did not arrive.
        """
        progress = self._in(update, Phase.LOADING)
        if lacking := sorted((update.expected & self._started.tensors.keys()) - progress.arrived):
            raise CoverageError(
                f"rank {self.rank}: {len(lacking)} expected tensors did not arrive, the first {lacking[:_NAMES_SHOWN]}; "
                "send them all before finish"
            )
        self._mixed = f"update {update.update_id} processed weights and was not committed"
        progress.cycle.finish()
        self.identity.synchronise()
        progress.phase = Phase.FINISHED

    def abort(self, update: Update, cause: str) -> AbortOutcome:
        """UNTOUCHED where no bucket was loaded; else RELOADABLE: a whole checkpoint mends whatever is there."""
        progress = self._progress
        if progress is None or progress.update.update_id != update.update_id:
            known = self._last is not None and self._last[0] == update.update_id
            return self._last[1] if known and self._last is not None else AbortOutcome.UNTOUCHED
        outcome = AbortOutcome.RELOADABLE if progress.cycle.opened else AbortOutcome.UNTOUCHED
        self._progress, self._last = None, (update.update_id, outcome)
        self.guard.uncommitted = self._mixed
        progress.cycle.abort(cause)
        return outcome

    def abort_natively(self, reason: str) -> None:
        """TensorRT-LLM wants every rank told of any rank's failure. Nothing to do where ours runs: it has its own end."""
        if self._progress is None and self.features.native_abort:
            self.worker.abort_update_weights(reason)

    def set_poison(self, cause: str | None) -> None:
        """Arm or disarm; None after a finished update is its commit."""
        self.guard.poison = cause
        progress = self._progress
        if cause is None and progress is not None and progress.phase is Phase.FINISHED:
            self._progress, self._mixed = None, ""
            self._last = (progress.update.update_id, AbortOutcome.RELOADABLE)
            self.version = progress.update.version
            self.guard.uncommitted, self.guard.waiting = "", False

    def forget(self) -> None:
        """Nothing of any update is left, committed or not; the weights are whatever they are."""
        if self._progress is not None:
            self.abort(self._progress.update, "forgotten")
        self._last, self._mixed, self.version = None, "", ""
        self.guard.poison, self.guard.uncommitted, self.guard.waiting = None, "", False

    def live(self) -> Mapping[str, LiveTensor]:
        """Parameters and buffers, the storage itself; as loaded where their module says that it rebuilds nothing."""
        found: dict[str, LiveTensor] = {}
        for path, module in self.model.named_modules():
            state = LiveState.PROCESSED if compat.rebuilds(module) else LiveState.PURE
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found.update(
                (f"{path}.{name}" if path else name, LiveTensor(tensor=tensor.detach(), state=state))
                for name, tensor in own
            )
        return found

    # -- inner -----------------------------------------------------------------------------------------------------
    def _landings(self, update: Update) -> set[str]:
        by_module = self._landing.by_module(self._started.tensors)
        check_whole_modules(self.model, by_module, update.expected, rank=self.rank)
        return {path for path, names in by_module.items() if names & update.expected}

    def _check_new(self, progress: _Progress, names: list[str]) -> None:
        repeated = [name for name in names if name in progress.arrived or names.count(name) > 1]
        if repeated:
            raise CoverageError(
                f"rank {self.rank}: tensor {repeated[0]!r} came again in update {progress.update.update_id}; expected every "
                "tensor once: send the update again"
            )

    def _in(self, update: Update, phase: Phase) -> _Progress:
        progress = self._progress
        if progress is None or progress.update.update_id != update.update_id or progress.phase is not phase:
            now = "no update" if progress is None else f"update {progress.update.update_id}, {progress.phase.value}"
            raise EngineStateError(f"rank {self.rank}: expected update {update.update_id}, {phase.value}; got {now}")
        return progress

    @property
    def is_updating(self) -> bool:
        """Between begin and its end."""
        return self._progress is not None


def rank_of(worker: Any) -> TrtllmRank:
    """The rank of a worker: the same at every call.

    Raises:
        EngineStateError: the worker's engine lacks what is needed.
    """
    found: TrtllmRank | None = getattr(worker, _ATTRIBUTE, None)
    if found is None:
        found = TrtllmRank(worker)
        setattr(worker, _ATTRIBUTE, found)  # it lives as long as the weights that it is about
    return found
