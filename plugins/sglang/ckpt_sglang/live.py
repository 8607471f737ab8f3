"""Live tensors of an SGLang model, and whether their bits are those of the checkpoint."""

from __future__ import annotations

from typing import Any

from ckpt_core.contract import LiveState, LiveTensor

# experts are not among them: kernels on GPUs want them in orders of their own
_AS_LOADED_ON_GPUS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def live_tensors(model: Any) -> dict[str, LiveTensor]:
    """Parameters and buffers by name; each once, where modules share them."""
    found: dict[str, LiveTensor] = {}
    for module_name, module in model.named_modules():
        state = LiveState.PURE if _keeps_bits(module) else LiveState.PROCESSED
        prefix = f"{module_name}." if module_name else ""
        for name, tensor in module.named_parameters(recurse=False):
            found.setdefault(prefix + name, LiveTensor(tensor=tensor.data, state=state))
        for name, tensor in module.named_buffers(recurse=False):
            found.setdefault(prefix + name, LiveTensor(tensor=tensor, state=LiveState.PROCESSED))
    seen: set[int] = set()
    return {name: item for name, item in found.items() if not _again(item.tensor.data_ptr(), seen)}


def processed_modules(model: Any) -> dict[str, str]:
    """Modules with parameters that are not as they were loaded, with the reason."""
    return {
        path: f"{type(module.quant_method).__name__} processes its weights"
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and not _keeps_bits(module)
    }


def _again(address: int, seen: set[int]) -> bool:
    if address in seen:
        return True
    if address:
        seen.add(address)
    return False


def _keeps_bits(module: Any) -> bool:
    """Whether nothing is done to the module's weights after loading."""
    method = getattr(module, "quant_method", None)
    if method is None:
        return True
    if getattr(module, "use_intel_amx_backend", False):
        return False  # packed for the CPU's matrix unit
    device = next((parameter.device.type for parameter in module.parameters(recurse=False)), "cpu")
    name = type(method).__name__
    return name.startswith("Unquantized") if device == "cpu" else name in _AS_LOADED_ON_GPUS
