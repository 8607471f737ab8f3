"""Worker extension of the vLLM benchmark: both projects' ways in, and a check of the live weights against generated values."""

from __future__ import annotations

from typing import Any

from ckpt_vllm import compat
from ckpt_vllm.extension import CkptWorkerExtension

try:
    from checkpoint_engine.worker import VllmColocateWorkerExtension as Peer
except ImportError:

    class Peer:  # type: ignore[no-redef]
        """Where the peer is not installed."""


_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class BenchExtension(CkptWorkerExtension, Peer):
    """One server start for both."""

    def ckpt_spoil(self) -> None:
        """Write a value into every live parameter that no checkpoint has there."""
        for parameter in compat.model_of(self).parameters():
            parameter.data.fill_(-1)

    def ckpt_take_way(self, way: str) -> None:
        """From now on load by that way: auto, direct or reload."""
        self.vllm_config.additional_config = {"ckpt": {"way": way}}  # type: ignore[attr-defined]

    def ckpt_wrong(self, model: str, layers: int, seed: int) -> dict[str, int]:
        """Live elements that differ from the generated checkpoint of that seed, on the device.

        In a dictionary: over HTTP vLLM turns numbers into text.
        """
        from vllm_shapes import shapes_of

        shapes = {shape.name: shape for shape in shapes_of(model, layers)}
        config = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        place = (self.rank % config.tensor_parallel_size, config.tensor_parallel_size)  # type: ignore[attr-defined]
        wrong = 0
        for name, parameter in compat.model_of(self).named_parameters():
            expected = _expected(name, shapes, seed, place, parameter.device)
            wrong += int((parameter.data != expected).sum())
        return {"wrong": wrong}


def _expected(name: str, shapes: Any, seed: int, place: tuple[int, int], device: Any) -> Any:
    import torch
    from generated import expected_values

    fused = next((kind for kind in _FUSED if kind in name), "")
    parts = []
    for part in _FUSED.get(fused, ("",)):
        shape = shapes[name.replace(fused, part) if fused else name]
        whole = expected_values(shape.name, shape.shape, seed, device)
        if shape.dim is not None:
            size = shape.shape[shape.dim] // place[1]
            whole = whole.narrow(shape.dim, place[0] * size, size)
        parts.append(whole)
    return torch.cat(parts)
