"""What TensorRT-LLM, or this plugin, cannot update in place: refused before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckpt_core.errors import EngineStateError
from ckpt_trtllm import compat
from ckpt_trtllm.cycle import check_capable
from ckpt_trtllm.landing import is_below

_NAMES_SHOWN = 4


def check_interface(features: compat.Features) -> None:
    """Raise where an engine is not of the shape that this plugin knows.

    Raises:
        EngineStateError: names what is absent.
    """
    if features.missing:
        raise EngineStateError(
            f"TensorRT-LLM {compat.engine_version() or 'of unknown version'}: its worker lacks {', '.join(features.missing)}; "
            "expected a worker of the PyTorch backend whose engine is set up: use such a version, or report this one"
        )


def check_supported(worker: Any, features: compat.Features, *, rank: int) -> None:
    """Raise where this engine cannot be updated now, or ever.

    Raises:
        EngineStateError: with the reason, TensorRT-LLM's own where it has one.
    """
    model = compat.model_of(worker)
    for holds, reason in (
        (
            not features.partial_loading,
            f"{type(model).__name__}.load_weights takes no allow_partial_loading: it cannot be loaded bucket by bucket; "
            "use a version where it can",
        ),
        (
            hasattr(model, compat.NATIVE_LATCH),
            "an update by TensorRT-LLM's own update_weights is open; end it with update_weights(None), or call "
            "abort_update_weights",
        ),
        (
            getattr(compat.loader_of(worker), "lora_config", None) is not None,
            "it was started with LoRA, which was never tried; start it without",
        ),
        (
            getattr(model, "draft_model", None) is not None,
            "it has a draft model, whose weights would be lost: start it without speculative decoding",
        ),
    ):
        if holds:
            raise EngineStateError(f"rank {rank} cannot be updated: {reason}")
    try:
        check_capable(model)
    except Exception as error:
        raise EngineStateError(f"rank {rank} cannot be updated, TensorRT-LLM says: {error}") from error


def check_whole_modules(
    model: Any, by_module: Mapping[str, Collection[str]], expected: Collection[str], *, rank: int
) -> None:
    """Raise where a partial update brings a part of what a module needs that is rebuilt as a whole.

    Args:
        by_module: names of the whole checkpoint, by the path that they land in: of a module, or of one around it.

    Raises:
        EngineStateError: names module and tensors.
    """
    sent = frozenset(expected)
    touched = [path for path, names in by_module.items() if sent & set(names)]
    for path, module in compat.modules_of(model):
        if not is_below(path, touched) or not compat.rebuilds(module):
            continue
        wanted = {name for top, names in by_module.items() if is_below(path, (top,)) for name in names}
        if lacking := sorted(wanted - sent):
            raise EngineStateError(
                f"rank {rank}: module {path} is rebuilt as a whole, and {len(lacking)} of its tensors would not come, the first "
                f"{lacking[:_NAMES_SHOWN]}; send all of a module, or a whole checkpoint"
            )
