"""Shapes of real models, in Hugging Face names, and which dimension tensor parallelism splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fleet_models

from ckpt_core.dtypes import DType
from ckpt_core.layout import Box

COLUMN, ROW, REPLICATED = 0, 1, None
ITEMSIZE = 2  # BF16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One tensor: `dim` is the one that tensor parallelism splits, None where every rank holds all.

    `heads`: of which at least one goes to each rank, where there may be fewer than ranks; else 0.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    dtype: DType = DType.BF16
    heads: int = 0

    @property
    def size_bytes(self) -> int:
        """In the checkpoint."""
        return math.prod(self.shape) * self.dtype.itemsize

    def box(self, rank: int, world: int) -> Box:
        """What a rank holds of it."""
        if self.dim is None:
            return Box.whole(self.shape)
        return fleet_models.run_box(self.shape, self.dim, world, rank, heads=self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The numbers of a config.json that decide the shapes; `experts` 0 for a dense model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0

    def tensors(self, layers: int) -> Iterator[Shape]:
        """All tensors, in model order."""
        yield Shape(name="model.embed_tokens.weight", shape=(self.vocab, self.hidden), dim=COLUMN)
        for layer in range(layers):
            yield from self._layer(f"model.layers.{layer}.")
        yield Shape(name="model.norm.weight", shape=(self.hidden,), dim=REPLICATED)
        yield Shape(name="lm_head.weight", shape=(self.vocab, self.hidden), dim=COLUMN)

    def _layer(self, prefix: str) -> Iterator[Shape]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = prefix + "self_attn."
        yield Shape(name=attention + "q_proj.weight", shape=(queries, self.hidden), dim=COLUMN)
        yield Shape(name=attention + "k_proj.weight", shape=(keys, self.hidden), dim=COLUMN)
        yield Shape(name=attention + "v_proj.weight", shape=(keys, self.hidden), dim=COLUMN)
        yield Shape(name=attention + "o_proj.weight", shape=(self.hidden, queries), dim=ROW)
        if self.experts:
            yield Shape(name=prefix + "mlp.gate.weight", shape=(self.experts, self.hidden), dim=REPLICATED)
        for mlp in [f"mlp.experts.{e}." for e in range(self.experts)] or ["mlp."]:
            yield Shape(name=prefix + mlp + "gate_proj.weight", shape=(self.intermediate, self.hidden), dim=COLUMN)
            yield Shape(name=prefix + mlp + "up_proj.weight", shape=(self.intermediate, self.hidden), dim=COLUMN)
            yield Shape(name=prefix + mlp + "down_proj.weight", shape=(self.hidden, self.intermediate), dim=ROW)
        yield Shape(name=prefix + "input_layernorm.weight", shape=(self.hidden,), dim=REPLICATED)
        yield Shape(name=prefix + "post_attention_layernorm.weight", shape=(self.hidden,), dim=REPLICATED)


def _fixed(decoder: Decoder) -> Callable[[int], list[Shape]]:
    return lambda layers: list(decoder.tensors(layers))


def _first(decoder: fleet_models.MoeDecoder) -> Callable[[int], list[Shape]]:
    """Shapes of a large model's first layers."""
    return lambda layers: [
        Shape(name=cut.meta.name, shape=cut.meta.shape, dim=cut.dim, dtype=cut.meta.dtype, heads=cut.heads)
        for cut in decoder.first(layers).cuts()
    ]


DECODERS = {
    "qwen3-32b": Decoder(hidden=5120, intermediate=25600, heads=64, kv_heads=8, head_dim=128, vocab=151936),
    "qwen3-30b-a3b": Decoder(
        hidden=2048, intermediate=768, heads=32, kv_heads=4, head_dim=128, vocab=151936, experts=128
    ),
    "tiny": Decoder(hidden=256, intermediate=512, heads=8, kv_heads=2, head_dim=32, vocab=1024),
}
LARGE = {
    **fleet_models.DECODERS,
    # block scales that do not divide, experts, a router: for machines without a GPU
    "tiny-fp8": fleet_models.MoeDecoder(
        hidden=256,
        layers=3,
        dense_layers=1,
        intermediate=512,
        expert_intermediate=256,
        experts=4,
        shared_experts=1,
        vocab=1024,
        heads=4,
        q_lora=128,
        kv_lora=128,
        qk_nope_dim=64,
        qk_rope_dim=32,
        v_dim=64,
        fp8=True,
        router_bias=True,
    ),
}
MODELS: dict[str, Callable[[int], list[Shape]]] = {
    **{name: _fixed(decoder) for name, decoder in DECODERS.items()},
    **{name: _first(decoder) for name, decoder in LARGE.items()},
}
