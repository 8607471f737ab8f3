"""The second half of `compat`: attributes of vLLM's layers that tell what a checkpoint has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ckpt_vllm import compat

if TYPE_CHECKING:
    import torch


def is_experts(module: Any) -> bool:
    """Experts in packed parameters."""
    return compat.is_a(module, "RoutedExperts", "FusedMoE") and hasattr(module, "quant_method")


def fused_sizes(module: Any) -> list[int]:
    """Rows of each part of a fused linear in the checkpoint; empty for other modules."""
    if compat.is_a(module, "QKVParallelLinear"):
        head, value = module.head_size, getattr(module, "v_head_size", module.head_size)
        return [module.total_num_heads * head, module.total_num_kv_heads * head, module.total_num_kv_heads * value]
    return [int(size) for size in getattr(module, "output_sizes", ())]


def whole_shape(module: Any, name: str, parameter: Any) -> tuple[int, ...] | None:
    """Shape in the checkpoint of a plain parameter that may be sharded; None where only its loader knows."""
    if compat.is_a(module, "VocabParallelEmbedding"):
        return (module.org_vocab_size, *parameter.shape[1:])
    if compat.is_a(module, "LinearBase"):
        rows = int(module.output_size)
        return (rows,) if name == "bias" else (rows, int(module.input_size))
    loader = getattr(parameter, "weight_loader", None)
    return tuple(parameter.shape) if loader is None else None


def expert_count(module: Any) -> int:
    """Logical experts: redundant ones are copies."""
    config = getattr(module, "moe_config", None)
    return int(getattr(config, "num_logical_experts", 0) or module.global_num_experts)


def expert_names(module: Any) -> dict[str, str]:
    """What the model calls gate, up and down projection in its checkpoint."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    return {kind: getattr(module, f"ckpt_{kind}_name", None) or kind for kind in kinds}


def expert_sizes(module: Any, parameter: Any, kind: str, model_config: Any) -> tuple[int | None, int | None]:
    """Intermediate and hidden size of an expert in the checkpoint; None where vLLM rounded them up."""
    text = model_config.hf_text_config
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    hidden = getattr(text, "hidden_size", None)
    tp_size = int(getattr(getattr(module, "moe_config", None), "tp_size", 0) or getattr(module, "tp_size", 1))
    held = parameter.shape[2] if kind == "w2" else parameter.shape[1] // 2
    seen = parameter.shape[1] if kind == "w2" else parameter.shape[2]
    return (inner, hidden) if held * tp_size == inner and seen == hidden else (None, None)


def renaming_of(model: Any) -> Any:
    """From names in the checkpoint to names in the model, fused parts left apart; None for names that it drops."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return str
    if hasattr(mapper, "orig_to_new_stacked"):
        import dataclasses

        mapper = dataclasses.replace(mapper, orig_to_new_stacked={})
    return mapper.map_name if hasattr(mapper, "map_name") else mapper._map_name


def stage_test_of(model: Any) -> Any:
    """Whether a parameter of the model is on another pipeline stage."""
    from vllm.model_executor.models.utils import is_pp_missing_parameter

    return lambda name: is_pp_missing_parameter(name, model)


class LoadFormat:
    """A model's parameters as its loader wants them, on the meta device: what a loader can be recorded on.

    Copies of what vLLM remembers for its reloads: an attribute that is left on one of those breaks the next reload.
    """

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

        self._model = model
        self._of = {
            path: {
                name: restore_layer_refs(to_meta_tensor(tensor), module)
                for name, tensor in compat.load_format(module).items()
            }
            for path, module in model.named_modules()
        }

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """By path and name."""
        for path, tensors in self._of.items():
            for name, tensor in tensors.items():
                yield f"{path}.{name}" if path else name, tensor

    def named_buffers(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """None."""
        return iter(())

    def load(self, weights: Any) -> None:
        """The model's own loader, with these in the place of its parameters until it returns."""
        modules = dict(self._model.named_modules())
        before = {path: dict(module._parameters) for path, module in modules.items()}
        try:
            for path, tensors in self._of.items():
                modules[path]._parameters.update(tensors)
            self._model.load_weights(weights)
        finally:
            for path, parameters in before.items():
                modules[path]._parameters.clear()
                modules[path]._parameters.update(parameters)
