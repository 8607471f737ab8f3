"""The model, its weight mapper, and the balancer of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import torch

from ckpt_conformance.reference.config import ModelConfig
from ckpt_conformance.reference.experts import FusedExperts
from ckpt_conformance.reference.kv_cache import SequenceCache
from ckpt_conformance.reference.layers import LayerContext
from ckpt_conformance.reference.model import CausalLM
from ckpt_trtllm.standin.layers import Reloadable, make_reloadable

_GATE, _UP = "gate_proj.weight", "up_proj.weight"


class WeightMapper:
    """Knows fused modules by name. Keeps a gate until its other half comes: as it was given, a view."""

    mapping: Mapping[str, tuple[str, ...]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self) -> None:
        self.pending: dict[str, torch.Tensor] = {}

    def ready(self, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """What can be loaded now; halves with the halves that waited for them."""
        self.pending.update((name, tensor) for name, tensor in weights.items() if name.endswith((_GATE, _UP)))
        yield from ((name, tensor) for name, tensor in weights.items() if not name.endswith((_GATE, _UP)))
        for gate in [name for name in self.pending if name.endswith(_GATE)]:
            up = gate.removesuffix(_GATE) + _UP
            if up in self.pending:
                yield gate, self.pending.pop(gate)
                yield up, self.pending.pop(up)

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Halves whose others did not come."""
        while self.pending:
            yield self.pending.popitem()


class StandInModel(CausalLM):
    """The reference model behind TensorRT-LLM's `load_weights`."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.model_config = SimpleNamespace(pretrained_config=SimpleNamespace(tie_word_embeddings=config.tied))
        for _, layer in self.loadable_layers():
            make_reloadable(layer)

    def reloadable_layers(self) -> list[Reloadable]:
        """All layers with weights."""
        return [layer for _, layer in self.loadable_layers() if isinstance(layer, Reloadable)]

    def load_weights(  # type: ignore[override]
        self, weights: Mapping[str, torch.Tensor], weight_mapper: WeightMapper, allow_partial_loading: bool = False
    ) -> None:
        """Load what is known of these; the rest is dropped in silence.

        Raises:
            ValueError: not all of the model came, where all of it must.
        """
        if not allow_partial_loading and (lacking := self.table.keys() - weights.keys()):
            raise ValueError(f"{len(lacking)} tensors are missing, e.g. {min(lacking)}")
        self.load_known(weight_mapper.ready(weights))

    def load_known(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load those that a module wants."""
        for name, tensor in weights:
            if (target := self.table.get(name)) is not None:
                target.layer.load(target.parameter, tensor, target.shard_id)

    def process_weights_after_loading(self) -> None:
        """Each module has its own, which the engine calls."""

    def post_load_weights(self) -> None:
        """As above."""


class Balancer:
    """Must be told of new experts."""

    def __init__(self, model: StandInModel) -> None:
        self._experts = [layer for layer in model.reloadable_layers() if isinstance(layer, FusedExperts)]
        self._registered = self._known = -1

    def register_weight_slots_after_to_cuda(self) -> None:
        """Look where the experts are."""
        self._registered = self._loads()

    def finalize_model(self) -> None:
        """Take over what was registered."""
        self._known = self._registered

    @property
    def is_current(self) -> bool:
        """Whether it knows the experts as they are."""
        return self._known == self._loads()

    def _loads(self) -> int:
        return sum(layer.loads for layer in self._experts)


def next_token(model: StandInModel, token_ids: list[int], cache: SequenceCache) -> int:
    """Greedy, behind what the cache holds."""
    with torch.no_grad():
        return int(model.next_logits(torch.tensor(token_ids, device=model.context.device), cache).argmax())
