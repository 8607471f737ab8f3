"""Real vLLM in the conformance suite: engines in this process for the hooks, real servers for the rest.

Engines are started with `vllm.LLM`, engine core and worker in this process, and kept: shutting one down would tear down groups
that all share. A worker that is handed out again has its weights spoilt and its caches dropped. The CPU build packs the weights
of linear layers into memory that no tensor shows, so they could be neither spoilt nor read: these engines use vLLM's own
fallback, plain matrix products on the parameters, as GPUs do. Servers run as they are, packed, and are compared by digests.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ckpt_conformance.harness import Harness, NotOffered, Server
from ckpt_conformance.levels import ModelKind
from ckpt_conformance.models.tiny import make_tiny
from ckpt_core.api import Target
from ckpt_core.errors import EngineStateError
from ckpt_vllm import answers, compat
from ckpt_vllm.control import ENGINE
from ckpt_vllm.loading import Way

if TYPE_CHECKING:
    import torch

_SIZES: dict[str, Any] = {
    "vocab": 512,
    "hidden": 128,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 256,
    "experts": 4,
    "moe_intermediate": 64,
}
MODELS: dict[ModelKind, dict[str, Any]] = {
    ModelKind.PLAIN: {"arch": "llama", **_SIZES},
    ModelKind.TIED: {"arch": "qwen3", "tied": True, **_SIZES},
    ModelKind.EXPERTS: {"arch": "qwen3_moe", **_SIZES, "layers": 1},
    ModelKind.QUANTISED: {"arch": "llama", **_SIZES},
    ModelKind.ODD_SIZES: {
        "arch": "qwen3",
        **_SIZES,
        "vocab": 301,
        "heads": 3,
        "kv_heads": 1,
        "hidden": 90,
        "intermediate": 70,
    },
}
_START: dict[ModelKind, dict[str, Any]] = {ModelKind.QUANTISED: {"quantization": "fp8_per_channel"}}
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_SILENT_STEPS = 50
_CONTEXT = 2700
_PROMPT_TOKENS = 100  # room for what checks ask, and for what they ask then
_GARBAGE = 0x55
_serial = itertools.count(1)


class VllmHarness(Harness):
    """Real vLLM.

    Args:
        way: how models are loaded; AUTO as users get it.
    """

    engine = ENGINE
    plugin_module = "ckpt_vllm.plugin"
    engine_modules = ("torch", "vllm")
    kinds = frozenset(MODELS)
    streams = compat.has_token_route()

    def __init__(self, way: Way = Way.AUTO) -> None:
        self._way = way
        self._idle: dict[ModelKind, list[Any]] = {}
        self._fresh: dict[Path, Any] = {}
        self._engines: dict[int, tuple[ModelKind, Any]] = {}  # by id of the adapter, which the engine keeps alive

    def checkpoint(self, directory: Path, kind: ModelKind, seed: int) -> Path:
        """Random weights; sizes that vLLM's CPU attention takes."""
        return make_tiny(directory, seed=seed, **MODELS[kind])

    def make_worker(self, checkpoint: Path, kind: ModelKind) -> Any:
        """From those that are idle, or a new one; spoilt and paused."""
        idle = self._idle.setdefault(kind, [])
        worker = idle.pop() if idle else self._start(checkpoint, kind, load_format="dummy")
        self._renew(worker)
        return worker

    def fresh(self, checkpoint: Path, kind: ModelKind) -> Any:
        """One for each checkpoint; nobody writes to it."""
        if checkpoint not in self._fresh:
            self._fresh[checkpoint] = self._start(checkpoint, kind, load_format="auto")
        return self._fresh[checkpoint]

    def live(self, worker: Any) -> Mapping[str, torch.Tensor]:
        """Parameters; in the middle of a reload those that vLLM has put aside."""
        model = compat.model_of(worker.worker)
        found: dict[str, torch.Tensor] = {}
        aside = {id(module): info.kernel_tensors[0] for module, info in compat.pending_modules(model)}
        for path, module in model.named_modules():
            for name, parameter in aside.get(id(module), module._parameters).items():
                if parameter is not None and parameter.numel():
                    found[f"{path}.{name}"] = parameter.data
        return found

    def close(self, worker: Any) -> None:
        """Idle again; engines are never shut down, see the module."""
        worker.abort()
        kind, _ = self._engines[id(worker)]
        if worker not in self._fresh.values():
            self._idle.setdefault(kind, []).append(worker)

    def generate(self, worker: Any, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy; raises where step after step brings nothing."""
        from vllm import SamplingParams

        engine = self._llm(worker).llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = f"check-{next(_serial)}"
        engine.add_request(request, {"prompt_token_ids": list(prompt_token_ids)}, params)
        silent = 0
        try:
            while silent < _SILENT_STEPS:
                outputs = [output for output in engine.step() if output.request_id == request]
                if outputs and outputs[-1].finished:
                    return [int(token) for token in outputs[-1].outputs[0].token_ids]
                silent = 0 if outputs else silent + 1
            raise EngineStateError(f"no token in {_SILENT_STEPS} steps: vLLM is paused")
        finally:
            engine.abort_request([request])

    def serve(self, worker: Any) -> None:
        """Resume, as a client would."""
        compat.core_call(self._llm(worker).llm_engine, "resume_scheduler")

    def waiting_worker(self, checkpoint: Path, kind: ModelKind) -> Any:
        """As `--additional-config '{"ckpt": {"wait_for_weights": true}}'` does."""
        return self._start(checkpoint, kind, load_format="dummy", options={"wait_for_weights": True})

    @contextmanager
    def failing_finish(self, worker: Any, error: Exception) -> Iterator[None]:
        """Closing vLLM's bracket raises; a model that is loaded directly has nothing that is processed."""
        if self._direct(worker):
            raise NotOffered("failing_finish(): vLLM processes nothing after a direct load")
        with patch(
            "vllm.model_executor.model_loader.reload.layerwise.finalize_layerwise_processing", side_effect=error
        ):
            yield

    def target(self, worker: Any) -> Target:
        """The LLM as an engine by itself."""
        return Target(engine=ENGINE, url=f"in-process-{id(worker):x}", handle=self._llm(worker))

    @contextmanager
    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> Iterator[Server]:
        """A real server, its weights packed as its kernels want them."""
        from ckpt_vllm.launch import VllmServer

        options: dict[str, Any] = {"extra": answers.SERVER_OPTIONS, "max_model_len": _CONTEXT} if self.streams else {}
        with VllmServer(checkpoint, tp=ranks, load_format="dummy" if dummy else "auto", **options) as server:
            yield Server(
                target=Target(engine=ENGINE, url=server.url),
                generate=server.generate,
                digests=server.live_digests,
                stream=partial(answers.stream, server.client) if self.streams else None,
                most_tokens=_CONTEXT - _PROMPT_TOKENS,
            )

    def _llm(self, worker: Any) -> Any:
        return self._engines[id(worker)][1]

    def _direct(self, worker: Any) -> bool:
        from ckpt_vllm.loading import choose

        return choose(compat.model_of(worker.worker), self._way).way is Way.DIRECT

    def _renew(self, worker: Any) -> None:
        """What the last user left behind is undone by the plugin, and no value of it survives."""
        worker.set_poison(None)
        worker.version = ""
        engine = self._llm(worker).llm_engine
        compat.core_call(engine, "pause_scheduler", "abort", True)
        compat.core_call(engine, "set_weight_version", "default")
        for tensor in self.live(worker).values():
            tensor.view(tensor.dtype).untyped_storage().fill_(_GARBAGE)

    def _start(
        self, checkpoint: Path, kind: ModelKind, *, load_format: str, options: dict[str, Any] | None = None
    ) -> Any:
        if not self._engines and kind is not ModelKind.EXPERTS:
            self._start_groups(checkpoint.parent)
        os.environ.update(_ENVIRONMENT)
        from vllm import LLM

        compat.use_plain_products()
        compat.forget_rotary_tables()
        llm = LLM(
            str(checkpoint),
            load_format=load_format,
            enforce_eager=True,
            max_model_len=128,
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=8 << 20,
            disable_log_stats=True,
            generation_config="vllm",
            additional_config={"ckpt": {"way": self._way.value, **(options or {})}},
            **_START.get(kind, {}),
        )
        from ckpt_vllm.adapter import adapter_of

        worker = adapter_of(compat.worker_in_process(llm.llm_engine.engine_core.engine_core))
        self._engines[id(worker)] = (kind, llm)
        return worker

    def _start_groups(self, directory: Path) -> None:
        """vLLM makes its process groups for the first model of a process, and those of experts only if it has some."""
        checkpoint = self.checkpoint(directory / "first", ModelKind.EXPERTS, seed=0)
        self._idle.setdefault(ModelKind.EXPERTS, []).append(
            self._start(checkpoint, ModelKind.EXPERTS, load_format="dummy")
        )


harness = VllmHarness()
reload_harness = VllmHarness(way=Way.RELOAD)
