"""What lives in a rank process: the model, its caches, and the state that the update hooks go by.

A worker with one rank also runs alone, without server and process group, and then serves as the
endpoint's handle.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ckpt_conformance.reference.checkpoint import load_checkpoint
from ckpt_conformance.reference.config import read_config
from ckpt_conformance.reference.draft import next_token
from ckpt_conformance.reference.kv_cache import KvCache
from ckpt_conformance.reference.layers import LayerContext
from ckpt_conformance.reference.messages import StepItem
from ckpt_conformance.reference.model import CausalLM
from ckpt_conformance.reference.options import ENGINE_NAME, TAGS, WorkerOptions
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_core.contract import (
    AbortOutcome,
    AttachResult,
    DeviceKind,
    EndpointState,
    EndpointStatus,
    LiveState,
    LiveTensor,
    LoadReport,
    PauseMode,
    RecordingTarget,
    Rendezvous,
    Update,
)
from ckpt_core.errors import ConfigError, CoverageError, EngineStateError

if TYPE_CHECKING:
    from ckpt_core.plugins import EnginePlugin

Snapshot = dict[str, torch.Tensor]


class Worker:
    """One rank of the engine.

    Attributes:
        model, kv: weights and caches.
        rank, tp_size, device, instance_id: who it is.
        version: of the last committed update, or what the server says.
        paused: the scheduler does not step.
        asleep: tags of the memory that was given back.
        updating: the update between begin and finish or abort.
        poison_cause: the guard armed by the core, or None.
        mixed_cause: why the weights are of no one checkpoint, or None; the engine's own knowledge, cleared
            by a complete load or a restore and by nothing else.
        waiting_cause: why there are no real weights yet, or None; cleared by the first commit.
    """

    def __init__(
        self,
        model_dir: Path | str,
        options: WorkerOptions | None = None,
        *,
        group: TpGroup | None = None,
        instance_id: str = "",
    ) -> None:
        options, group = options or WorkerOptions(), group or TpGroup()
        config = read_config(model_dir, dtype=options.dtype)
        self.options = options
        self.rank, self.tp_size = group.rank, group.size
        self.device = torch.device(options.device)
        self.instance_id = instance_id or uuid.uuid4().hex
        dtype = getattr(torch, config.dtype.torch_name)
        context = LayerContext(group=group, dtype=dtype, device=self.device, quantise=options.quantise)
        self.model = CausalLM(config, context)
        self._load_first(Path(model_dir))
        self.kv = KvCache(self.model.cache_shape(), prefix_blocks=options.prefix_blocks)
        self.version = ""
        self.paused = False
        self.asleep: frozenset[str] = frozenset()
        self.updating: Update | None = None
        self.poison_cause: str | None = None
        self.mixed_cause: str | None = None
        self.waiting_cause = "no weights have been committed yet" if options.wait_for_weights else None
        self._touched: Update | None = None  # the last update that wrote a parameter and is not committed or undone
        self._finished = False
        self._mixed_before: str | None = None
        self._arrived: set[str] = set()
        self._sequence_id = 0
        self._blank: CausalLM | None = None
        self._written_past = False

    # -- state ---------------------------------------------------------------------------
    @property
    def state(self) -> EndpointState:
        """What this rank does now; the first reason not to serve wins."""
        states = (
            (self.updating is not None, EndpointState.UPDATING),
            (self.poison_cause or self.mixed_cause, EndpointState.POISONED),
            (bool(self.asleep), EndpointState.ASLEEP),
            (self.waiting_cause, EndpointState.WAITING_FOR_WEIGHTS),
            (self.paused, EndpointState.PAUSED),
        )
        return next((state for holds, state in states if holds), EndpointState.SERVING)

    @property
    def detail(self) -> str:
        """Why it does not serve; empty where it does."""
        if self.updating is not None:
            return f"update {self.updating.update_id} is running"
        if cause := self.poison_cause or self.mixed_cause:
            return cause
        if self.asleep:
            return f"asleep: {', '.join(sorted(self.asleep))}"
        return self.waiting_cause or ("paused" if self.paused else "")

    @property
    def device_uuid(self) -> str:
        """Hardware UUID of the accelerator; on CPU one that no other rank has."""
        if self.device.type == "cpu":
            return f"cpu-{self.instance_id}-{self.rank}"
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"

    def status(self) -> EndpointStatus:
        """As `ckpt_ready` returns it, for a worker that is an engine by itself."""
        return EndpointStatus(
            engine=ENGINE_NAME,
            state=self.state,
            world_size=self.tp_size,
            device_kind=DeviceKind(self.device.type),
            instance_id=self.instance_id,
            version=self.version,
            device_uuids=() if self.device.type == "cpu" else (self.device_uuid,),
            detail=self.detail,
        )

    # -- tokens --------------------------------------------------------------------------
    def step(self, items: Sequence[StepItem]) -> list[int]:
        """One greedy token of each sequence. Computed one by one: a token never depends on the batch.

        Raises:
            EngineStateError: the rank may not produce tokens now.
        """
        self._check_may_serve()
        with torch.no_grad():
            return [self._next_token(item) for item in items]

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation of one prompt; ends early at an end token, which is included."""
        self._sequence_id -= 1  # negative: never one of a scheduler's
        tokens, wanted = list(prompt_token_ids), len(prompt_token_ids) + max_tokens
        prefill = True
        try:
            while len(tokens) < wanted and (prefill or tokens[-1] not in self.model.config.eos_token_ids):
                new = tokens if prefill else tokens[-1:]
                item = StepItem(sequence_id=self._sequence_id, token_ids=new, prefill=prefill)
                tokens = tokens + self.step([item])
                prefill = False
        finally:
            self.kv.free([self._sequence_id])
        return tokens[len(prompt_token_ids) :]

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits [t, vocab] of a whole sequence, without the prefix cache."""
        from ckpt_conformance.reference.kv_cache import SequenceCache

        self._check_may_serve()
        with torch.no_grad():
            return self.model(  # type: ignore[no-any-return]
                torch.tensor(list(token_ids), device=self.device), SequenceCache(self.kv.shape)
            )

    # -- control -------------------------------------------------------------------------
    def pause(self, mode: PauseMode = PauseMode.WAIT) -> int:
        """Stop producing tokens. Nothing runs between calls here, so all modes are one. Idempotent."""
        self.paused = True
        return 0

    def resume(self, version: str | None = None) -> None:
        """Serve again.

        Raises:
            EngineStateError: poisoned, updating, asleep or without weights; it stays paused.
        """
        if self.state not in (EndpointState.PAUSED, EndpointState.SERVING):
            raise EngineStateError(f"rank {self.rank} cannot resume: it is {self.state.value}: {self.detail}")
        self.paused = False
        self.version = version or self.version

    def flush_cache(self) -> None:
        """Drop the prefix cache."""
        self.kv.flush()

    def sleep(self) -> None:
        """Give back the memory of weights and caches.

        Raises:
            EngineStateError: not paused, or updating.
        """
        if not self.paused or self.updating is not None:
            raise EngineStateError(f"rank {self.rank} cannot sleep while {self.state.value}; pause it first")
        self.model.release()
        self.kv.clear()
        self.asleep = frozenset(TAGS)

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        """Allocate memory again. Weights come back without contents: no token before an update is committed.

        Raises:
            EngineStateError: an unknown tag.
        """
        wanted = frozenset(tags)
        if not wanted <= set(TAGS):
            raise EngineStateError(f"unknown tags {sorted(wanted - set(TAGS))}; expected some of {', '.join(TAGS)}")
        if "weights" in wanted & self.asleep:
            self.model.allocate()
            self.waiting_cause = "weights were dropped by sleep; update them"
        self.asleep -= wanted

    def attach(self, rendezvous: Rendezvous, plugin: EnginePlugin | None = None) -> AttachResult:
        """Take part in an update; blocks until it is over on this rank."""
        from ckpt_core.worker import attach

        return attach(self, rendezvous, engine=ENGINE_NAME, plugin=plugin)

    # -- update --------------------------------------------------------------------------
    def begin_update(self, update: Update) -> None:
        """Make parameters loadable.

        Raises:
            EngineStateError: updating, asleep or not paused; nothing was changed.
        """
        self.check_updatable()
        self.model.begin_reload()
        self.updating = update
        self._touched, self._finished = None, False
        self._mixed_before = self.mixed_cause
        self._written_past = False
        self._arrived.clear()

    def check_updatable(self) -> None:
        """Raise EngineStateError where an update cannot begin: updating, weights asleep, or not paused."""
        if self.updating is not None:
            raise EngineStateError(
                f"rank {self.rank} already runs update {self.updating.update_id!r}; wait for its end"
            )
        if "weights" in self.asleep:
            raise EngineStateError(f"rank {self.rank} is asleep, its weights are gone; wake tag 'weights' first")
        if not self.paused:
            raise EngineStateError(f"rank {self.rank} is {self.state.value}, expected paused; pause the engine first")

    def load(self, update: Update, tensors: Sequence[tuple[str, torch.Tensor]]) -> LoadReport:
        """Load whole checkpoint tensors; all are checked before the first is written.

        Raises:
            EngineStateError: that update is not running here.
            CoverageError: an unknown name, a wrong shape or dtype.
        """
        self._check_running(update)
        for name, tensor in tensors:
            self.model.check_weight(name, tensor)
        self._touched = update
        self.mixed_cause = f"update {update.update_id!r} wrote a part of the weights and did not finish"
        loaded = self.model.load_weights(tensors)
        self._arrived |= loaded
        names = [name for name, _ in tensors]
        return LoadReport(
            loaded=tuple(name for name in names if name in loaded),
            ignored=tuple(name for name in names if name not in loaded),
        )

    def finish_update(self, update: Update) -> None:
        """Quantise what arrived and wait for the device. Old keys and values stay until flushed.

        Raises:
            EngineStateError: that update is not running here, or a quantised module arrived in part.
            CoverageError: an expected tensor did not arrive.
        """
        self._check_running(update)
        if lacking := sorted((update.expected & self.model.table.keys()) - self._arrived):
            raise CoverageError(f"rank {self.rank}: {len(lacking)} expected tensors did not arrive: {lacking[:8]}")
        self.model.process_weights_after_loading()
        self.kv.forget_ahead()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if update.replayed:
            self._touched = update
        # a partial update over mixed weights mends only what it brought
        complete = self._arrived | update.replayed >= self.model.table.keys()
        self.mixed_cause = None if complete else self._mixed_before
        self.updating, self._finished = None, True

    def recording_target(self) -> RecordingTarget:
        """The model once more, without data, and the live one."""
        if self._blank is None:
            context = replace(self.model.context, device=torch.device("meta"))
            self._blank = CausalLM(self.model.config, context)
        quantised = {
            path: "its weight is quantised after loading"
            for path, layer in self.model.loadable_layers()
            if any(spec.quantised for spec in layer.specs.values())
        }
        return RecordingTarget(model=self._blank, load=self._blank.load_weights, live=self.model, excluded=quantised)

    def abort_update(self, update: Update, cause: str) -> AbortOutcome:
        """Stop an update, in any state, as often as one likes. A new one can begin afterwards."""
        if self.updating is not None and self.updating.update_id == update.update_id:
            self.model.begin_reload()  # frees half-loaded full-precision parameters
            self.updating = None
            if update.replayed and self._touched is None and self.mixed_cause is None:
                self.mixed_cause, self._written_past = cause, True  # the core knows: if nothing was, it disarms
        if self._touched is None or self._touched.update_id != update.update_id:
            return AbortOutcome.UNTOUCHED
        self._finished = False
        self.mixed_cause = cause
        return AbortOutcome.RELOADABLE

    def set_poison(self, cause: str | None) -> None:
        """Arm or disarm the guard. Disarming after a finished update is its commit."""
        self.poison_cause = cause
        if cause is None and self._written_past:
            self.mixed_cause = None
        self._written_past = self._written_past and cause is not None
        if cause is None and self._finished and self._touched is not None:
            self.version = self._touched.version
            self._touched, self._finished, self.waiting_cause = None, False, None

    def live(self) -> dict[str, LiveTensor]:
        """Live tensors by name, the storage itself.

        Raises:
            EngineStateError: asleep.
        """
        if "weights" in self.asleep:
            raise EngineStateError(f"rank {self.rank} is asleep and has no weights; wake tag 'weights' first")
        processed = (".weight_int8", ".weight_scale", ".w13_int8", ".w13_scale", ".w2_int8", ".w2_scale")
        return {
            name: LiveTensor(
                tensor=tensor,
                state=LiveState.PROCESSED if name.endswith(processed) else LiveState.PURE,
            )
            for name, tensor in self.model.live_tensors().items()
        }

    def snapshot(self) -> Snapshot:
        """Copies of all live tensors."""
        return {name: live.tensor.clone() for name, live in self.live().items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Write a snapshot back into the same storage.

        Raises:
            EngineStateError: an update is running, or the snapshot is of another model.
        """
        live = self.live()
        if self.updating is not None or live.keys() != snapshot.keys():
            raise EngineStateError(f"rank {self.rank} cannot restore while {self.state.value}, or not this snapshot")
        for name, tensor in snapshot.items():
            live[name].tensor.copy_(tensor)
        self._touched, self.mixed_cause = None, None

    # -- inner ---------------------------------------------------------------------------
    def _load_first(self, model_dir: Path) -> None:
        if self.options.load_format == "dummy":
            self.model.fill_random(self.options.seed)
        elif self.options.load_format == "auto":
            load_checkpoint(self.model, model_dir)
        else:
            raise ConfigError(f"load format {self.options.load_format!r} is not known; expected auto or dummy")
        self.model.process_weights_after_loading()

    def _check_running(self, update: Update) -> None:
        running = self.updating.update_id if self.updating else None
        if running != update.update_id:
            raise EngineStateError(
                f"rank {self.rank}: update {update.update_id!r} is not running here (running: {running}); "
                "begin it first"
            )

    def _check_may_serve(self) -> None:
        if self.state is not EndpointState.SERVING:
            raise EngineStateError(f"rank {self.rank} produces no token, it is {self.state.value}: {self.detail}")

    def _next_token(self, item: StepItem) -> int:
        cache = self.kv.start(item.sequence_id, item.token_ids) if item.prefill else None
        sequence = cache or self.kv.sequences[item.sequence_id]
        new = item.token_ids[sequence.length :] if item.prefill else item.token_ids
        token = next_token(self.model, torch.tensor(new, device=self.device), sequence)
        if item.prefill:
            self.kv.prefix.store(item.token_ids, sequence)
        return token
