"""One rank of SGLang as `ckpt_core.worker` sees it: its models, its guard, and the update it is in."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import (
    AbortOutcome,
    DeviceKind,
    LiveTensor,
    LoadBucket,
    LoadReport,
    RankInfo,
    RecordingTarget,
    Update,
)
from ckpt_core.errors import CoverageError, EngineError, EngineStateError
from ckpt_sglang import compat
from ckpt_sglang.fit import Shape, fit, joined
from ckpt_sglang.guard import Board, Gate, Guard
from ckpt_sglang.held import Held
from ckpt_sglang.live import processed_modules

if TYPE_CHECKING:
    import torch

    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest

_INSTANCE_TIMEOUT = timedelta(seconds=120)
_NAMES_SHOWN = 8


class Phase(Enum):
    """Where an update of this rank stands."""

    IDLE = "idle"
    LOADING = "loading"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class Progress:
    """One update of this rank.

    Attributes:
        update: which.
        held: tensors that wait for others.
        phase: how far.
        written: live parameters may have been written.
        arrived: names that came.
    """

    update: Update
    held: Held
    phase: Phase = Phase.LOADING
    written: bool = False
    arrived: set[str] = field(default_factory=set)


class SglangRank:
    """See the module. One per scheduler, for its whole life."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        parallel = compat.parallel()
        self.tp_rank, self.tp_size = int(parallel.tp_rank), int(parallel.tp_size)
        self.pp_rank, self.pp_size = int(parallel.pp_rank), int(parallel.pp_size)
        self.rank = self.pp_rank * self.tp_size + self.tp_rank
        self.world_size = self.pp_size * self.tp_size
        store = compat.rank_store()
        self.instance_id = _instance_id(store, self.rank)
        self.guard = Guard(
            scheduler,
            Board(store, rank=self.rank, world_size=self.world_size),
            waiting=compat.waits_for_weights(),
        )
        self.gate = Gate(scheduler, self.guard.board.reason)
        self._together: Mapping[str, frozenset[str]] = {}
        self._clone: frozenset[str] = frozenset()
        self._known: frozenset[str] | None = None  # names that the loader takes; not known before the first layout
        self._blank: tuple[Any, Any] | None = None
        self._progress: Progress | None = None
        self._last: tuple[str, AbortOutcome] | None = None

    # -- who it is -------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        import torch

        found = torch.device(self.scheduler.tp_worker.model_runner.device)
        if found.type == "cuda" and found.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return found

    @property
    def device_uuid(self) -> str:
        """Hardware UUID on a GPU; on CPU a name of this rank."""
        device = self.device
        if device.type != "cuda":
            return f"cpu-{self.instance_id}-{self.rank}"
        import torch

        uuid_text = str(torch.cuda.get_device_properties(device).uuid)
        return uuid_text if uuid_text.startswith("GPU-") else f"GPU-{uuid_text}"

    def identify(self) -> RankInfo:
        """Who this rank is."""
        device, parallel = self.device, compat.parallel()
        if device.type not in ("cpu", "cuda"):
            raise EngineError(f"SGLang runs on {device.type}; expected cpu or cuda: other devices are not supported")
        return RankInfo(
            instance_id=self.instance_id,
            device_kind=DeviceKind(device.type),
            device_index=device.index or 0,
            device_uuid=self.device_uuid,
            rank=self.rank,
            world_size=self.world_size,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            ep_rank=int(parallel.moe_ep_rank),
            ep_size=int(parallel.moe_ep_size),
        )

    # -- what may be refused ---------------------------------------------------------------------------------------
    def check_state(self) -> None:
        """Raise where no update can begin now.

        Raises:
            EngineStateError: updating, asleep, or in a native update session.
        """
        if self._progress is not None:
            raise EngineStateError(
                f"rank {self.rank} is in update {self._progress.update.update_id}; end or abort it first"
            )
        if compat.weights_are_released(self.scheduler):
            raise EngineStateError(
                f"rank {self.rank}: the weights' memory is released; call /resume_memory_occupation with tag weights first"
            )
        if compat.native_session_open(self.scheduler):
            raise EngineStateError(
                f"rank {self.rank}: /begin_weight_update was called and not ended; call /end_weight_update first"
            )

    def layout(self, manifest: Manifest) -> Layout:
        """What every model of this rank needs of a checkpoint, found without touching it.

        Raises:
            EngineStateError: a model cannot be loaded again while it runs.
        """
        shape = Shape(
            tp_size=self.tp_size,
            whole=self.pp_size == 1 and int(compat.parallel().moe_ep_size) == 1,
            model_path=compat.model_path(self.scheduler),
        )
        fits = [
            fit(compat.model_without_data(runner), runner.model, manifest, shape)
            for _, runner in compat.runners(self.scheduler)
        ]
        self._together = {name: names for one in fits for name, names in one.together.items()}
        self._clone = frozenset[str]().union(*(one.clone for one in fits))
        layout = joined([one.layout for one in fits])
        self._known = frozenset(entry.tensor for entry in layout.entries)
        return layout

    def recording_target(self) -> RecordingTarget | None:
        """The model once more without data, and the live one. With a draft model there are two loaders: none then."""
        runners = [runner for _, runner in compat.runners(self.scheduler)]
        if len(runners) != 1:
            return None
        (runner,) = runners
        if self._blank is None or self._blank[0] is not runner.model:
            self._blank = runner.model, compat.model_without_data(runner)
        blank = self._blank[1]
        return RecordingTarget(
            model=blank,
            load=lambda weights: compat.load_into(runner, blank, weights),
            live=runner.model,
            excluded=processed_modules(runner.model),
        )

    # -- an update -------------------------------------------------------------------------------------------------
    def begin(self, update: Update) -> None:
        """Nothing is written yet: what quantisation packed is unpacked at the first bucket.

        Raises:
            EngineStateError: see check_state; or the scheduler is not paused.
        """
        self.check_state()
        if not compat.is_paused(self.scheduler):
            raise EngineStateError(f"rank {self.rank}: the scheduler is not paused; pause it first (/ckpt/pause)")
        self.synchronise()  # with overlapped scheduling, or paused in place, a step may still run
        self._last = None
        self._progress = Progress(update=update, held=Held(self._together, self._clone))
        self.guard.mark_updating(update.update_id)

    def load(self, update: Update, bucket: LoadBucket) -> LoadReport:
        """Give a bucket to the engine's own loader, which copies at once."""
        progress = self._in(update, Phase.LOADING)
        if not progress.written:
            progress.written = True
            for _, runner in compat.runners(self.scheduler):
                compat.begin_native(runner)
        known = self._known
        ignored = tuple(item.name for item in bucket.tensors if known is not None and item.name not in known)
        tensors = [(name, tensor) for name, tensor in bucket.named_tensors() if name not in ignored]
        names = tuple(name for name, _ in tensors)
        progress.arrived.update(names, ignored)
        for ready in progress.held.ready(tensors, progress.update.expected):
            for _, runner in compat.runners(self.scheduler):
                compat.load_native(runner, iter(ready))
        self.synchronise()
        return LoadReport(loaded=names, ignored=ignored, retained_bytes=progress.held.retained_bytes)

    def finish(self, update: Update) -> None:
        """Fixups and quantisation, each failure of which is a failure of the update."""
        progress = self._in(update, Phase.LOADING)
        if missing := sorted(update.expected - progress.arrived):
            raise CoverageError(
                f"rank {self.rank}: {len(missing)} expected tensors did not arrive, first {missing[:_NAMES_SHOWN]}; "
                "send them all before finish"
            )
        for _, runner in compat.runners(self.scheduler):
            if update.replayed and not progress.written:
                compat.begin_native(runner)  # all ranks post-process, whatever each of them replayed
            compat.end_native(runner)
        self.synchronise()
        progress.phase = Phase.FINISHED

    def abort(self, update: Update) -> AbortOutcome:
        """UNTOUCHED where no bucket was loaded; else RELOADABLE: the loader overwrites whatever is there."""
        progress = self._progress
        if progress is None or progress.update.update_id != update.update_id:
            if self._last is not None and self._last[0] == update.update_id:
                return self._last[1]
            return AbortOutcome.UNTOUCHED
        outcome = AbortOutcome.RELOADABLE if progress.written else AbortOutcome.UNTOUCHED
        self._progress, self._last = None, (update.update_id, outcome)
        if outcome is AbortOutcome.UNTOUCHED:
            self.guard.mark_updating("")
        return outcome

    def set_poison(self, cause: str | None) -> None:
        """Arm or disarm; None after a finished update is its commit."""
        if cause is not None:
            self.guard.arm(cause)
            return
        if self._progress is not None and self._progress.phase is Phase.FINISHED:
            committed, self._progress = self._progress.update, None
            self._last = (committed.update_id, AbortOutcome.RELOADABLE)
            compat.record_version(self.scheduler, committed.version)
            self.guard.first_weights()
        if self._progress is None:
            self.guard.mark_updating("")
        self.guard.disarm()

    def live(self) -> dict[str, LiveTensor]:
        """All parameters and buffers, the storage itself."""
        return dict(self._live())

    def _live(self) -> Iterator[tuple[str, LiveTensor]]:
        from ckpt_sglang.live import live_tensors

        for role, runner in compat.runners(self.scheduler):
            prefix = "" if role == "target" else f"{role}."
            for name, tensor in live_tensors(runner.model).items():
                yield prefix + name, tensor

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""
        device = self.device
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    def _in(self, update: Update, phase: Phase) -> Progress:
        progress = self._progress
        if progress is None or progress.update.update_id != update.update_id or progress.phase is not phase:
            now = "no update" if progress is None else f"update {progress.update.update_id}, {progress.phase.value}"
            raise EngineStateError(f"rank {self.rank}: expected update {update.update_id}, {phase.value}; got {now}")
        return progress


def _instance_id(store: Any, rank: int) -> str:
    """One per engine start, the same on all ranks."""
    if store is None:
        return uuid.uuid4().hex
    if rank == 0:
        store.set("instance", uuid.uuid4().hex)
    store.wait(["instance"], _INSTANCE_TIMEOUT)
    return str(store.get("instance").decode())
