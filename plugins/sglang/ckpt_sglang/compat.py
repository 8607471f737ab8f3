"""The only place that looks at SGLang's version or at names it does not promise to keep; `compat_front` is its second half."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import EngineError, EngineStateError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_ALONE = (
    threading.RLock()
)  # SGLang builds and loads models by process-wide state: the default dtype, the open layer stack
RAN_ON = ("0.5.17", "0.5.23")  # versions on which this plugin ran on the real engine; the README says what of it

# -- where hooks go: dotted paths for SGLang's HookRegistry ----------------------------------------------------------
SCHEDULER = "sglang.srt.managers.scheduler"
SCHEDULER_INIT = f"{SCHEDULER}.Scheduler.__init__"
INTERNAL_STATE = f"{SCHEDULER}.Scheduler.get_internal_state"
WEIGHT_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
UPDATE_FROM_IPC = f"{WEIGHT_MANAGER}.update_weights_from_ipc"
RELEASE_MEMORY = f"{WEIGHT_MANAGER}.release_memory_occupation"
PULL_REQUESTS = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
TOKENIZER = "sglang.srt.managers.tokenizer_manager"
TOKENIZER_INIT = f"{TOKENIZER}.TokenizerManager.__init__"
TOKENIZER_CONTINUE = f"{TOKENIZER}.TokenizerManager.continue_generation"
TOKENIZER_UPDATE = f"{TOKENIZER}.TokenizerManager.update_weights_from_ipc"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
WAIT_FUNCTION = "_wait_weights_ready"


def engine_version() -> str | None:
    """Installed version of SGLang, or None."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def warn_of_other_versions() -> None:
    """Say so where this version was never run."""
    found = engine_version()
    if found not in RAN_ON:
        _log.warning(
            "ckpt: SGLang %s was never run with this plugin (it ran on %s); what it lacks is found by feature and refused",
            found,
            ", ".join(RAN_ON),
        )


def has(path: str) -> bool:
    """Whether a dotted path (module, class, attribute) exists in this SGLang."""
    module, class_name, attribute = path.rsplit(".", 2)
    try:
        return hasattr(getattr(import_module(module), class_name), attribute)
    except (ImportError, AttributeError):
        return False


def role_of_this_process() -> str:
    """Which process loads plugins: "scheduler", "detokenizer", or "main" where that cannot be told.

    By what is imported already: whoever runs a scheduler or a detokenizer has its module and not the launcher's.
    """
    loaded = sys.modules
    if "sglang.launch_server" in loaded and "sglang.srt.entrypoints.engine" in loaded:
        return "main"
    if SCHEDULER in loaded and TOKENIZER not in loaded:
        return "scheduler"
    if "sglang.srt.managers.detokenizer_manager" in loaded and SCHEDULER not in loaded:
        return "detokenizer"
    return "main"


# -- a scheduler and what hangs on it --------------------------------------------------------------------------------
def parallel() -> Any:
    """Sizes and ranks of this process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def rank_store() -> Any:
    """Key-value store that all ranks of this instance reach, or None with one rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return dist.PrefixStore("ckpt", _get_default_store())


def waits_for_weights() -> bool:
    """Whether the server was started with --checkpoint-engine-wait-weights-before-ready."""
    from sglang.srt.runtime_context import get_model

    return bool(getattr(get_model(), "checkpoint_engine_wait_weights_before_ready", False))


def weight_version() -> str:
    """Version that the scheduler serves."""
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().weight_version)


def record_version(scheduler: Any, version_: str) -> None:
    """From here on tokens are made by that version: also for requests that are there already."""
    record = getattr(scheduler, "record_weight_version_change", None)
    if record is not None:
        record(new_version=version_)
        return
    from sglang.srt.runtime_context import get_context  # 0.5.17: requests do not remember versions

    get_context().override("ckpt", weight_version=version_)


def model_path(scheduler: Any) -> str:
    """What the engine was started on."""
    return str(scheduler.tp_worker.model_runner.model_config.model_path)


def runners(scheduler: Any) -> list[tuple[str, Any]]:
    """Role and model runner of every model that has weights: the target first, then draft models."""
    if not _lists_runners(scheduler):
        return [("target", scheduler.tp_worker.model_runner)]  # with a draft model no update gets past `not_updatable`
    found = list(scheduler.tp_worker.weight_update_runners())
    if scheduler.draft_worker is not None:
        found += scheduler.draft_worker.weight_update_runners()
    return found


def _lists_runners(scheduler: Any) -> bool:
    return hasattr(scheduler.tp_worker, "weight_update_runners")


def not_updatable(scheduler: Any) -> str | None:
    """What this engine runs that its version of SGLang, unlike later ones, has no means to load again (0.5.17)."""
    if scheduler.draft_worker is not None and not _lists_runners(scheduler):
        return "a draft model: it does not say which models speculative decoding holds"
    runner = scheduler.tp_worker.model_runner
    if runner.model_config.quantization is not None and not hasattr(runner.weight_updater, "begin_weight_update"):
        return (
            f"--quantization {runner.model_config.quantization}: it cannot undo what post-processing did to the weights"
        )
    return None


def weights_are_released(scheduler: Any) -> bool:
    """Whether the weights' memory is given back to the device (release_memory_occupation)."""
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS

    return GPU_MEMORY_TYPE_WEIGHTS in scheduler.weight_updater.offload_tags


def is_paused(scheduler: Any) -> bool:
    """Whether the scheduler takes no step."""
    return bool(scheduler._engine_paused)


def set_paused(scheduler: Any, *, paused: bool) -> None:
    """Let the scheduler take no step, or take some again, and nothing else."""
    scheduler._engine_paused = paused


def native_session_open(scheduler: Any) -> bool:
    """Whether somebody is between SGLang's own begin_weight_update and end_weight_update."""
    return getattr(scheduler.weight_updater, "_session", None) is not None


def contents_go_with_memory() -> bool:
    """Whether releasing the weights' memory loses their bits."""
    from sglang.srt.runtime_context import get_exec

    features = get_exec().features
    return bool(features.enable_memory_saver) and not bool(features.enable_weights_cpu_backup)


def derived_cache_error(model: Any) -> str | None:
    """SGLang's own reason not to update this model while it runs."""
    try:
        from sglang.srt.model_executor.model_runner_components.weight_updater import (
            _unsupported_derived_weight_cache_error as reason,
        )

        found: str | None = reason(model) if signature(reason).parameters else reason()
    except ImportError:
        return None  # it imports the kernels it asks about: those that cannot be imported cache nothing
    return found


def weight_cache_mode() -> str:
    """How weights are shared between engines; "off" where they are this engine's own."""
    from sglang.srt.runtime_context import get_model

    return str(getattr(get_model(), "weight_cache_mode", "off"))


def begin_native(runner: Any) -> None:
    """Undo what quantisation packed in place, so that weights can be loaded again."""
    if hasattr(runner.weight_updater, "begin_weight_update"):
        runner.weight_updater.begin_weight_update()  # 0.5.17 has none: see `not_updatable`


def end_native(runner: Any) -> None:
    """The model's own fixup, then quantisation of every module: the order of a load at start."""
    if hasattr(runner.weight_updater, "end_weight_update"):
        runner.weight_updater.end_weight_update(run_post_load=True)
        return
    import torch
    from sglang.srt.model_loader import loader

    loader._post_load_weights(runner.model)
    for module in runner.model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            with loader.device_loading_context(module, torch.device(runner.device)):
                method.process_weights_after_loading(module)


def load_native(runner: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The engine's own loader."""
    load_into(runner, runner.model, weights)


def load_into(runner: Any, model: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The loader of a model like the runner's."""
    import torch
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with _ALONE, torch.no_grad(), set_default_torch_dtype(runner.model_config.dtype):
        model.load_weights(weights)


def model_without_data(runner: Any) -> torch.nn.Module:
    """The runner's model once more, with all parameters on the meta device, of the shapes that are loaded."""
    import torch
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    config = runner.model_config
    quantisation = loader._get_quantization_config(config, runner.load_config)
    with _ALONE, set_default_torch_dtype(config.dtype), torch.device("meta"):
        return loader._initialize_model(config, runner.load_config, quantisation)


def abort_output(scheduler: Any, request: Any, message: str, status_code: int) -> None:
    """End a request that was not taken, with a message to its client."""
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "status_code": status_code, "message": message}
    answer = AbortReq(rid=request.rid, abort_message=message, finished_reason=reason)
    if hasattr(scheduler, "send_abort_output"):
        scheduler.send_abort_output(answer, request)
    else:
        scheduler.ipc_channels.send_to_tokenizer.send_output(answer, request)


def request_kinds() -> tuple[type, tuple[type, ...], tuple[type, ...]]:
    """Types of: a resume; one request for tokens; a batch of such."""
    from sglang.srt.managers import io_struct

    return (
        io_struct.ContinueGenerationReqInput,
        (io_struct.TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput),
        (io_struct.BatchTokenizedGenerateReqInput, io_struct.BatchTokenizedEmbeddingReqInput),
    )


def is_health_check(request: Any) -> bool:
    """Whether a request is the server's own health check."""
    from sglang.srt.managers.utils import is_health_check_generate_req

    return bool(is_health_check_generate_req(request))


def ipc_answer(*, success: bool, message: str) -> Any:
    """What the scheduler answers to update_weights_from_ipc."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqOutput

    return UpdateWeightsFromIPCReqOutput(success=success, message=message)


def require(path: str) -> None:
    """Refuse a version that lacks a place this plugin hooks into.

    Raises:
        EngineError: it does.
    """
    if not has(path):
        raise EngineError(
            f"SGLang {engine_version()} has no {path}; this plugin ran on {', '.join(RAN_ON)}: use such a version"
        )


def check_topology() -> None:
    """Refuse engines whose ranks one update cannot reach.

    Raises:
        EngineStateError: data parallel, or several tokenizer workers.
    """
    found = parallel()
    attention = any(bool(getattr(found, name, False)) for name in ("attn_dp_enabled", "enable_dp_attention"))
    if int(found.dp_size) != 1 or attention:
        raise EngineStateError(
            "SGLang does not hand weight updates to data-parallel ranks (--dp-size, --enable-dp-attention); run one server per "
            "replica and name each with --endpoint"
        )
    from sglang.srt.runtime_context import get_serving

    if int(getattr(get_serving(), "tokenizer_worker_num", 1)) != 1:
        raise EngineStateError("--tokenizer-worker-num over 1: workers do not know of each other's pause; use one")


def load_plugins() -> None:
    """What SGLang does at the start of its own processes: find plugins and apply their hooks."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # SGLang decides by it when it is first imported
    from sglang.srt.managers import scheduler

    scheduler.load_plugins()
