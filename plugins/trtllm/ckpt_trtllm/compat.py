"""The only place that looks at TensorRT-LLM's version or at names that it does not promise to keep.

Written from its sources (`tensorrt_llm/llmapi/rlhf_utils.py` and what that calls, of several releases) and never run on it: every
name is looked for before it is used, and a worker that lacks one that is needed is refused with that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DISTRIBUTION = "tensorrt_llm"
NATIVE_LATCH = "first_pre_reload_weights"  # on the model, while an update by TensorRT-LLM's own call is open
_NATIVE_EXTENSION = "tensorrt_llm.llmapi.rlhf_utils"
_NEEDED = (
    "engine.control_action",
    "engine.reset_prefix_cache",
    "engine.model_engine.forward",
    "engine.model_engine.model.load_weights",
    "engine.model_engine.model.named_modules",
    "engine.model_engine.model_loader.reload",
)
_LOADER_CYCLE = ("begin_update_weights", "finalize_update_weights", "abort_update_weights")
_BALANCER = ("register_weight_slots_after_to_cuda", "finalize_model")
_DIRECTORIES = ("hf_model_dir", "_hf_model_dir", "llm_args.model", "llm_args.model_dir")


# -- versions ----------------------------------------------------------------------------------------------------------
def engine_version() -> str | None:
    """Installed version of TensorRT-LLM; None where it is not installed. Imports nothing of it."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def is_installed() -> bool:
    """Whether there is something to import: the registry's package of that name may be an empty stub."""
    return engine_version() is not None and find_spec(DISTRIBUTION) is not None


def version_warning(installed: str | None) -> str:
    """What to tell of any installed version; empty where there is none."""
    if installed is None:
        return ""
    return (
        f"ckpt-core was never run on TensorRT-LLM (found: {installed}), only on a stand-in of its documented shape; run "
        "`ckpt-conformance --engine trtllm` on this machine before you rely on it"
    )


def native_extension() -> type[Any] | None:
    """TensorRT-LLM's own worker extension, whose calls an engine must keep; None where it is not installed."""
    if not is_installed():
        return None
    found: type[Any] = import_module(_NATIVE_EXTENSION).WorkerExtension
    return found


# -- the worker --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a worker's engine has, found by looking.

    Attributes:
        missing: names that are needed and absent.
        partial_loading: the model's loader takes a part of the checkpoint at a time.
        drain_option: control actions need not wait for requests to finish.
        loader_cycle: the loader is told of begin, end and abort of an update.
        native_abort: the worker has `abort_update_weights`.
    """

    missing: tuple[str, ...]
    partial_loading: bool
    drain_option: bool
    loader_cycle: bool
    native_abort: bool


def features_of(worker: Any) -> Features:
    """Look at a worker; calls nothing of it."""
    missing = tuple(path for path in _NEEDED if not callable(_at(worker, path)))
    loader = _at(worker, "engine.model_engine.model_loader")
    model = _at(worker, "engine.model_engine.model")
    return Features(
        missing=missing,
        partial_loading=_takes(getattr(unwrapped(model), "load_weights", None), "allow_partial_loading")
        and _takes(getattr(loader, "reload", None), "allow_partial_loading"),
        drain_option=_takes(_at(worker, "engine.control_action"), "drain"),
        loader_cycle=all(callable(getattr(loader, name, None)) for name in _LOADER_CYCLE),
        native_abort=callable(getattr(worker, "abort_update_weights", None)),
    )


def unwrapped(model: Any) -> Any:
    """The model itself where torch.compile wrapped it: the loader finds modules by names that the wrapper changes."""
    return getattr(model, "_orig_mod", model)


def model_of(worker: Any) -> Any:
    """The target model of this rank."""
    return unwrapped(worker.engine.model_engine.model)


def loader_of(worker: Any) -> Any:
    """What has `reload`."""
    return worker.engine.model_engine.model_loader


def keepers_of(worker: Any) -> tuple[Any, ...]:
    """Objects that may keep parts of a checkpoint between two calls of the loader."""
    loader = loader_of(worker)
    mapper = getattr(loader, "weight_mapper", None)
    return (loader,) if mapper is None else (loader, mapper)


def fused_parts(worker: Any) -> Mapping[str, tuple[str, ...]]:
    """Last names of fused modules, with those of their parts in checkpoints, as the engine's own mapper has them."""
    found = getattr(getattr(loader_of(worker), "weight_mapper", None), "mapping", None)
    if not isinstance(found, Mapping):
        return {}
    return {str(fused): tuple(map(str, parts)) for fused, parts in found.items() if not isinstance(parts, str)}


def balancer_of(worker: Any) -> Any | None:
    """What spreads experts over ranks, where the engine has one that must be told of new weights."""
    balancer = getattr(worker.engine.model_engine, "moe_load_balancer", None)
    return balancer if all(callable(getattr(balancer, name, None)) for name in _BALANCER) else None


def model_directory(worker: Any) -> Path | None:
    """Where the engine was started from."""
    for path in _DIRECTORIES:
        found = _at(worker, path)
        if isinstance(found, str | Path) and Path(found).is_dir():
            return Path(found)
    return None


def is_tied(model: Any) -> bool:
    """Whether the head is the embedding, by the model's configuration."""
    configs = (getattr(model, "config", None), _at(model, "model_config.pretrained_config"))
    return any(bool(getattr(config, "tie_word_embeddings", False)) for config in configs)


def in_flight(worker: Any) -> int | None:
    """Requests that the executor holds; None where it does not tell."""
    active = getattr(worker.engine, "active_requests", None)
    waiting = getattr(worker.engine, "waiting_queue", None)
    return None if active is None else len(active) + len(waiting or ())


def place_of(worker: Any) -> dict[str, int]:
    """Ranks and sizes, by the names of `ckpt_core.contract.RankInfo`."""
    dist = getattr(worker.engine, "dist", None)
    mapping = getattr(dist, "mapping", None) or _at(worker, "engine.model_engine.mapping")
    found = {
        "rank": _number(getattr(worker, "global_rank", None), getattr(dist, "rank", None), default=0),
        "world_size": _number(getattr(mapping, "world_size", None), getattr(dist, "world_size", None), default=1),
    }
    for ours, theirs in (("tp", "tp"), ("pp", "pp"), ("ep", "moe_ep")):
        found[f"{ours}_rank"] = _number(getattr(mapping, f"{theirs}_rank", None), default=0)
        found[f"{ours}_size"] = _number(getattr(mapping, f"{theirs}_size", None), default=1)
    return found


# -- modules -----------------------------------------------------------------------------------------------------------
def modules_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules with weights on this rank, the root first."""
    for path, module in model.named_modules():
        if not getattr(module, "_weights_removed", False):
            yield path, module


def rebuilds(module: Any) -> bool:
    """Whether `pre_reload_weights` gives a module new storage, without values. True where it does not say."""
    if not callable(getattr(module, "pre_reload_weights", None)):
        return False
    return bool(getattr(module, "rebuild_tensor_metadata", True))


def is_balanced(module: Any) -> bool:
    """Whether a module's experts are moved about while the engine runs: its `pre_reload_weights` raises then, half-way."""
    balanced = getattr(module, "_using_load_balancer", None)
    return callable(getattr(module, "pre_reload_weights", None)) and callable(balanced) and bool(balanced())


def _at(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def _takes(function: Any, parameter: str) -> bool:
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _number(*candidates: Any, default: int) -> int:
    return next((int(found) for found in candidates if isinstance(found, int)), default)
