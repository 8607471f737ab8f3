"""`model_loader`: loads at the start, and again while the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ckpt_conformance.reference.checkpoint import read_tensors
from ckpt_conformance.reference.config import read_config
from ckpt_conformance.reference.layers import LayerContext
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_trtllm.standin.model import Balancer, StandInModel, WeightMapper

_DUMMY_SEED = 99


class ModelLoader:
    """Of one rank."""

    def __init__(self, directory: Path, group: TpGroup, *, quantise: bool, device: str) -> None:
        self._directory = directory
        self._group = group
        self._quantise = quantise
        self._device = torch.device(device)
        self._model: StandInModel | None = None
        self.weight_mapper = WeightMapper()
        self.lora_config = None

    def load(self, load_format: str) -> tuple[StandInModel, Balancer | None]:
        """A model with the files' weights ("auto") or random ones ("dummy")."""
        config = read_config(self._directory, dtype="auto")
        dtype = getattr(torch, config.dtype.torch_name)
        context = LayerContext(group=self._group, dtype=dtype, device=self._device, quantise=self._quantise)
        model = self._model = StandInModel(config, context)
        if load_format == "dummy":
            model.fill_random(_DUMMY_SEED)
        else:
            model.load_weights(dict(read_tensors(self._directory)), self.weight_mapper)
        for module in model.modules():
            for name in ("process_weights_after_loading", "post_load_weights"):
                getattr(module, name, _nothing)()
        if config.moe is None:
            return model, None
        balancer = Balancer(model)
        balancer.register_weight_slots_after_to_cuda()
        balancer.finalize_model()
        return model, balancer

    def reload(self, model: StandInModel, weights: dict[str, Any], allow_partial_loading: bool = False) -> None:
        """Load some tensors, or all."""
        model.load_weights(weights, self.weight_mapper, allow_partial_loading=allow_partial_loading)

    def begin_update_weights(self) -> None:
        """Nothing of an earlier update is left."""
        self.weight_mapper.pending.clear()

    def finalize_update_weights(self) -> None:
        """What the mapper keeps is loaded as it is."""
        if self._model is not None:
            self._model.load_known(self.weight_mapper.rest())

    def abort_update_weights(self) -> None:
        """What the mapper keeps is dropped."""
        self.weight_mapper.pending.clear()


def _nothing() -> None:
    """For modules without a method."""
