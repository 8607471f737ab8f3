"""Digests of the weights that a rank computes with, also of those that CPU kernels packed: for comparing two servers."""

from __future__ import annotations

import hashlib
from typing import Any

from ckpt_vllm import compat


def rank_digests(worker: Any) -> dict[str, str]:
    """Digest by name of every parameter with elements, and of every packed weight. Never raises.

    A packed weight is no tensor. It is read by multiplying the unit matrix with it: a sum with one term is exact.
    """
    try:
        return _digests(compat.model_of(compat.unwrapped(worker)))
    except Exception as error:  # noqa: BLE001 an exception would desynchronise vLLM's RPC
        return {"error": f"{type(error).__name__}: {error}"}


def _digests(model: Any) -> dict[str, str]:
    found = {name: _digest(parameter) for name, parameter in model.named_parameters() if parameter.numel()}
    for name, module in model.named_modules():
        if compat.is_packed(module):
            found[f"{name}.packed"] = _digest(unpacked(module))
    return found


def unpacked(module: Any) -> Any:
    """The weight (out, in) that a module's CPU kernel multiplies with."""
    import torch

    unit = torch.eye(compat.packed_inputs(module), dtype=compat.packed_dtype(module))
    with torch.no_grad():
        return module.cpu_linear(unit, module.weight, None).t().contiguous()


def _digest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy(), digest_size=16).hexdigest()
