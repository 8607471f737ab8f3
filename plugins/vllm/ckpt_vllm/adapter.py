"""The worker that the hooks get: one per vLLM worker, however the update came in, and its state between updates."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ckpt_core.contract import (
    AbortOutcome,
    DeviceKind,
    LiveState,
    LiveTensor,
    LoadBucket,
    LoadReport,
    RankInfo,
    RecordingTarget,
    Update,
)
from ckpt_core.errors import CoverageError, EngineError, EngineStateError
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_vllm import compat, compat_layers
from ckpt_vllm.expected import expected_of
from ckpt_vllm.facts import EngineFacts
from ckpt_vllm.layout import fits, layout_like, layout_of, started_from, unchecked
from ckpt_vllm.loading import Choice, DirectLoader, Loader, ReloadLoader, Way, choose

_one_engine_at_a_time = threading.RLock()  # vLLM's current configuration is a global of the process
_log = logging.getLogger("vllm.ckpt")  # below vLLM's own logger, whose handler shows it


@dataclass(slots=True, kw_only=True)
class _Running:
    """The update between begin and finish."""

    update: Update
    loaders: list[Loader]
    arrived: set[str] = field(default_factory=set)


class CkptWorker:
    """One rank of vLLM.

    Attributes:
        worker: vLLM's Worker.
        facts: asks what the scheduler does, which this process may not know by itself; the attach call brings it along.
        poison: why no token may be produced; None where it may.
        version: of the last commit; empty before.
        choice: how the model was loaded last, and why.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.facts: Callable[[], EngineFacts] = EngineFacts
        self.poison: str | None = None
        self.version = ""
        self.choice: Choice | None = None
        self._compare: Callable[[Manifest], Layout] | None = None
        self._running: _Running | None = None
        self._finished: Update | None = None
        self._touched = False

    # -- who it is ---------------------------------------------------------------------------------------------------
    @property
    def model(self) -> Any:
        """The target model."""
        return compat.model_of(self.worker)

    def identify(self) -> RankInfo:
        """Rank among all ranks of the instance, data parallel ones included."""
        from vllm.distributed import parallel_state as groups

        config, device = self.worker.vllm_config.parallel_config, self.worker.device
        tensor, pipeline = groups.get_tp_group(), groups.get_pp_group()
        dp_rank = int(getattr(config, "data_parallel_index", 0) or 0)
        rank = dp_rank * config.world_size + self.worker.rank
        return RankInfo(
            instance_id=str(self.worker.vllm_config.instance_id),
            device_kind=DeviceKind(device.type),
            device_index=_device_index(device),
            device_uuid=_device_uuid(device, rank),
            rank=rank,
            world_size=config.world_size * config.data_parallel_size,
            tp_rank=tensor.rank_in_group,
            tp_size=tensor.world_size,
            pp_rank=pipeline.rank_in_group,
            pp_size=pipeline.world_size,
            dp_rank=dp_rank,
            dp_size=config.data_parallel_size,
        )

    def check_updatable(self) -> None:
        """Raise EngineStateError where this model or state cannot be updated in place."""
        config = self.worker.vllm_config
        if getattr(config, "lora_config", None) is not None:
            raise EngineStateError(
                "vLLM was started with LoRA: its layers are wrapped, and vLLM cannot load a checkpoint into them in place; "
                "start it without --enable-lora"
            )
        self.facts().check_updatable()

    def layout(self, manifest: Manifest) -> Layout:
        """What this rank needs of a checkpoint. Reads the model's structure and touches nothing."""
        if self.options().get("check_names") is False:
            return unchecked(manifest)
        if self._compare is None:
            self._compare = self._how_to_compare()
        return self._compare(manifest)

    def _how_to_compare(self) -> Callable[[Manifest], Layout]:
        """With what the model wants, as far as that fits the files it was started from; else with these files."""
        model, config = self.model, self.worker.vllm_config.model_config
        expected = expected_of(model, config)
        rename, elsewhere = compat_layers.renaming_of(model), compat_layers.stage_test_of(model)
        compare = partial(layout_of, expected=expected, rename=rename, elsewhere=elsewhere)
        started = started_from(config.model)
        if started is None or fits(compare(started)):
            return compare
        _log.info(
            "this model renames or turns tensors in a way the plugin does not know: checkpoints must be like its files"
        )
        return partial(layout_like, started=started, aliases=expected.aliases)

    # -- the update --------------------------------------------------------------------------------------------------
    def begin(self, update: Update) -> None:
        """Make parameters loadable.

        Raises:
            EngineStateError: an update runs, the engine serves, or its weights are asleep; nothing is changed.
        """
        if self._running is not None:
            raise EngineStateError(
                f"update {self._running.update.update_id} is running on rank {self.worker.rank}; wait for its end"
            )
        self.facts().check_updatable()
        self._finished, self._touched = None, False
        self.choice = choose(self.model, self._wanted_way())
        _log.info("update %s goes %s (%s)", update.update_id, self.choice.way.value, self.choice.reason)
        running = _Running(update=update, loaders=[])
        self._running = running
        with self._engine_context():
            for model, model_config, way in self._targets(self.choice.way):
                running.loaders.append(_loader(model, model_config, way))

    def load(self, update: Update, bucket: LoadBucket) -> LoadReport:
        """Load the tensors of one bucket."""
        import torch

        running = self._of(update, "ckpt_load")
        tensors = list(bucket.named_tensors())
        self._touched = True
        with self._engine_context(), torch.no_grad():
            for loader in running.loaders:
                loader.load(tensors)
        running.arrived.update(name for name, _ in tensors)
        return LoadReport(
            loaded=tuple(name for name, _ in tensors),
            retained_bytes=sum(loader.retained_bytes for loader in running.loaders),
        )

    def finish(self, update: Update) -> None:
        """Process what is not complete, and wait for the device.

        Raises:
            CoverageError: an expected tensor did not arrive.
        """
        import torch

        running = self._of(update, "ckpt_finish")
        if absent := sorted(update.expected - running.arrived):
            raise CoverageError(
                f"rank {self.worker.rank}: {len(absent)} expected tensors did not arrive, the first {absent[:4]}; update again"
            )
        self._check_complete(running)
        with self._engine_context(), torch.no_grad():
            for loader in running.loaders:
                loader.finish()
            if self.worker.device.type == "cuda":
                torch.cuda.synchronize(self.worker.device)
        self._running, self._finished = None, update

    def abort(self) -> AbortOutcome:
        """Undo what can be undone; UNTOUCHED where no loader was called since the last commit."""
        running, self._running = self._running, None
        self._finished = None
        if running is not None:
            with self._engine_context():
                for loader in reversed(running.loaders):
                    loader.abort()
        return AbortOutcome.RELOADABLE if self._touched else AbortOutcome.UNTOUCHED

    def set_poison(self, cause: str | None) -> None:
        """Arm or disarm the guard; disarming after a finished update is its commit."""
        if cause is None and self._finished is not None:
            self.version = self._finished.version
            self._finished, self._touched = None, False
        self.poison = cause

    def live(self) -> Mapping[str, LiveTensor]:
        """Parameters and persistent buffers that have elements. What CPU kernels packed is not reachable."""
        choice = choose(self.model)
        state = LiveState.PURE if choice.way is Way.DIRECT else LiveState.PROCESSED
        return {
            name: LiveTensor(tensor=tensor.detach(), state=state)
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if tensor.numel() and not tensor.is_meta
        }

    def recording_target(self) -> RecordingTarget | None:
        """The live model, where its parameters are as they were loaded; else their load format, which nothing is replayed into.

        With a draft model in the same checkpoint there are two loaders: none then.
        """
        if compat.draft_model_of(self.worker) is not None:
            return None
        if choose(self.model, self._wanted_way()).way is Way.DIRECT:
            return RecordingTarget(
                model=self.model, load=self._in_context(self.model.load_weights), live=self.model, caches=compat.CACHES
            )
        blank = compat_layers.LoadFormat(self.model)
        excluded = {path: "vLLM reloads the whole model" for path, _ in self.model.named_modules()}
        return RecordingTarget(
            model=blank, load=self._in_context(blank.load), live=self.model, excluded=excluded, thin=True
        )

    def _in_context(
        self, load: Callable[[Iterable[tuple[str, Any]]], Any]
    ) -> Callable[[Iterable[tuple[str, Any]]], Any]:
        def run(weights: Iterable[tuple[str, Any]]) -> Any:
            with self._engine_context():
                return load(weights)

        return run

    def status(self) -> dict[str, Any]:
        """For `ckpt_ready`, as JSON."""
        return {
            "rank": int(self.worker.rank),
            "gpu": _device_uuid(self.worker.device, 0) if self.worker.device.type == "cuda" else "",
            "poison": self.poison or "",
            "updating": self._running is not None,
            "version": self.version,
            "way": self.choice.way.value if self.choice else "",
            "reason": self.choice.reason if self.choice else "",
        }

    def _check_complete(self, running: _Running) -> None:
        """Raise CoverageError where a module that is reloaded got some of its tensors, or none though all should come.

        vLLM would fill the rest of it with whatever is in memory, or keep the old weights.
        """
        for loader in running.loaders:
            for name, loaded, total in loader.incomplete():
                if loaded or not running.update.partial:
                    raise CoverageError(
                        f"rank {self.worker.rank}: module {name} got {loaded} of {total} elements; send all of a module together"
                    )

    def _of(self, update: Update, what: str) -> _Running:
        if self._running is None or self._running.update.update_id != update.update_id:
            raise EngineStateError(f"{what}: update {update.update_id} is not running on rank {self.worker.rank}")
        return self._running

    def _wanted_way(self) -> Way:
        options = self.options()
        text = str(options.get("way", Way.AUTO.value))
        try:
            return Way(text)
        except ValueError:
            raise EngineError(
                f"--additional-config ckpt.way is {text!r}; expected {', '.join(way.value for way in Way)}"
            ) from None

    def options(self) -> Mapping[str, Any]:
        """What the server was started with under `--additional-config '{"ckpt": {...}}'`."""
        given = getattr(self.worker.vllm_config, "additional_config", None)
        options = given.get("ckpt", {}) if isinstance(given, Mapping) else {}
        return options if isinstance(options, Mapping) else {}

    def _targets(self, way: Way) -> list[tuple[Any, Any, Way]]:
        """Models, with their configurations, and how each is loaded."""
        config = self.worker.vllm_config
        targets = [(self.model, config.model_config, way)]
        if (draft := compat.draft_model_of(self.worker)) is not None:
            draft_way = choose(draft, self._wanted_way()).way
            targets.append((draft, config.speculative_config.draft_model_config, draft_way))
        return targets

    def _engine_context(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(_one_engine_at_a_time)
        stack.enter_context(compat.on_device(self.worker.device))
        stack.enter_context(compat.current_config(self.worker))
        return stack


def adapter_of(worker: Any) -> CkptWorker:
    """The adapter of vLLM's worker (or of a wrapper of one): the same object at every call."""
    worker = compat.unwrapped(worker)
    adapter = compat.adapter_on(worker)
    if adapter is None:
        adapter = CkptWorker(worker)
        compat.keep_adapter(worker, adapter)
    kept: CkptWorker = adapter
    return kept


def _loader(model: Any, model_config: Any, way: Way) -> Loader:
    return DirectLoader(model) if way is Way.DIRECT else ReloadLoader(model, model_config)


def _device_index(device: Any) -> int:
    if device.type == "cpu":
        return 0
    import torch

    return int(device.index if device.index is not None else torch.cuda.current_device())


def _device_uuid(device: Any, rank: int) -> str:
    if device.type == "cpu":
        return f"cpu-{rank}"
    import torch

    uuid = str(torch.cuda.get_device_properties(_device_index(device)).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
