"""Checkpoints of large models from the numbers of their config.json, and what ranks of an engine need of them.

The numbers are those of the published config.json files (moonshotai/Kimi-K2-Instruct, deepseek-ai/DeepSeek-V3.1,
Qwen/Qwen3-235B-A22B-Instruct-2507, zai-org/GLM-4.5-Air); names, types and shapes are those of the checkpoints. How ranks cut
them follows vLLM: column-parallel weights along dimension 0, row-parallel ones along 1, block scales with their weights,
experts either cut like that or dealt to ranks in runs of consecutive numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_core.dtypes import DType
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.routing.columns import ints
from ckpt_core.routing.needs import WHOLE, ClassNeeds

_BLOCK = 128
COLUMN, ROW = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A tensor, and how ranks share it.

    Attributes:
        dim: that tensor parallelism splits; None where every rank has all.
        expert: number of the routed expert it belongs to; None for the rest.
        heads: of which at least one goes to each rank: key heads are fewer than ranks; 0 where that does not matter.
    """

    meta: TensorMeta
    dim: int | None = None
    expert: int | None = None
    heads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeDecoder:
    """The numbers of a config.json. `kv_lora` 0: grouped-query attention; `fp8`: block-quantised linear weights."""

    hidden: int
    layers: int
    dense_layers: int
    intermediate: int
    expert_intermediate: int
    experts: int
    shared_experts: int
    vocab: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_dim: int = 0
    fp8: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    router_bias: bool = False
    predict_layers: int = 0

    @property
    def all_layers(self) -> int:
        """Layers in the checkpoint, those of multi-token prediction among them."""
        return self.layers + self.predict_layers

    def first(self, layers: int) -> MoeDecoder:
        """The same model with its first so many layers alone."""
        decoding = min(layers, self.layers)
        return replace(self, layers=decoding, predict_layers=min(layers - decoding, self.predict_layers))

    def cuts(self) -> list[Cut]:
        """All tensors."""
        found = [
            self._plain("model.embed_tokens.weight", (self.vocab, self.hidden), COLUMN),
            self._plain("model.norm.weight", (self.hidden,)),
            self._plain("lm_head.weight", (self.vocab, self.hidden), COLUMN),
        ]
        for layer in range(self.layers + self.predict_layers):
            found += self._layer(f"model.layers.{layer}.", dense=layer < self.dense_layers)
            if layer >= self.layers:
                found += self._prediction(f"model.layers.{layer}.")
        return found

    def _prediction(self, prefix: str) -> Iterator[Cut]:
        """What a multi-token-prediction layer has beside an ordinary one."""
        yield self._plain(prefix + "embed_tokens.weight", (self.vocab, self.hidden), COLUMN)
        yield self._plain(prefix + "shared_head.head.weight", (self.vocab, self.hidden), COLUMN)
        yield self._plain(prefix + "eh_proj.weight", (self.hidden, 2 * self.hidden))
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield self._plain(f"{prefix}{norm}.weight", (self.hidden,))

    def _layer(self, prefix: str, *, dense: bool) -> Iterator[Cut]:
        yield from self._latent(prefix + "self_attn.") if self.kv_lora else self._grouped(prefix + "self_attn.")
        yield self._plain(prefix + "input_layernorm.weight", (self.hidden,))
        yield self._plain(prefix + "post_attention_layernorm.weight", (self.hidden,))
        if dense:
            yield from self._mlp(prefix + "mlp.", self.intermediate)
            return
        yield self._plain(prefix + "mlp.gate.weight", (self.experts, self.hidden))
        if self.router_bias:
            meta = TensorMeta(name=prefix + "mlp.gate.e_score_correction_bias", dtype=DType.F32, shape=(self.experts,))
            yield Cut(meta=meta)
        for expert in range(self.experts):
            yield from self._mlp(f"{prefix}mlp.experts.{expert}.", self.expert_intermediate, expert)
        if self.shared_experts:
            yield from self._mlp(prefix + "mlp.shared_experts.", self.shared_experts * self.expert_intermediate)

    def _mlp(self, prefix: str, width: int, expert: int | None = None) -> Iterator[Cut]:
        yield from self._linear(prefix + "gate_proj", (width, self.hidden), COLUMN, expert)
        yield from self._linear(prefix + "up_proj", (width, self.hidden), COLUMN, expert)
        yield from self._linear(prefix + "down_proj", (self.hidden, width), ROW, expert)

    def _latent(self, prefix: str) -> Iterator[Cut]:
        """Multi-head latent attention: what makes the latents is whole on each rank."""
        qk = self.qk_nope_dim + self.qk_rope_dim
        yield from self._linear(prefix + "q_a_proj", (self.q_lora, self.hidden), None)
        yield self._plain(prefix + "q_a_layernorm.weight", (self.q_lora,))
        yield from self._linear(prefix + "q_b_proj", (self.heads * qk, self.q_lora), COLUMN)
        yield from self._linear(prefix + "kv_a_proj_with_mqa", (self.kv_lora + self.qk_rope_dim, self.hidden), None)
        yield self._plain(prefix + "kv_a_layernorm.weight", (self.kv_lora,))
        yield from self._linear(
            prefix + "kv_b_proj", (self.heads * (self.qk_nope_dim + self.v_dim), self.kv_lora), COLUMN
        )
        yield from self._linear(prefix + "o_proj", (self.hidden, self.heads * self.v_dim), ROW)

    def _grouped(self, prefix: str) -> Iterator[Cut]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, heads in (("q", queries, 0), ("k", keys, self.kv_heads), ("v", keys, self.kv_heads)):
            yield self._plain(f"{prefix}{name}_proj.weight", (rows, self.hidden), COLUMN, heads=heads)
            if self.qkv_bias:
                yield self._plain(f"{prefix}{name}_proj.bias", (rows,), COLUMN, heads=heads)
        yield self._plain(prefix + "o_proj.weight", (self.hidden, queries), ROW)
        if self.qk_norm:
            yield self._plain(prefix + "q_norm.weight", (self.head_dim,))
            yield self._plain(prefix + "k_norm.weight", (self.head_dim,))

    def _linear(self, name: str, shape: tuple[int, int], dim: int | None, expert: int | None = None) -> Iterator[Cut]:
        weight = TensorMeta(name=name + ".weight", dtype=DType.F8_E4M3 if self.fp8 else DType.BF16, shape=shape)
        yield Cut(meta=weight, dim=dim, expert=expert)
        if self.fp8:
            blocks = tuple(-(-extent // _BLOCK) for extent in shape)
            scale = TensorMeta(name=name + ".weight_scale_inv", dtype=DType.F32, shape=blocks)
            yield Cut(meta=scale, dim=dim, expert=expert)

    @staticmethod
    def _plain(name: str, shape: tuple[int, ...], dim: int | None = None, heads: int = 0) -> Cut:
        return Cut(meta=TensorMeta(name=name, dtype=DType.BF16, shape=shape), dim=dim, heads=heads)


_KIMI_K2 = MoeDecoder(
    hidden=7168,
    layers=61,
    dense_layers=1,
    intermediate=18432,
    expert_intermediate=2048,
    experts=384,
    shared_experts=1,
    vocab=163840,
    heads=64,
    q_lora=1536,
    kv_lora=512,
    qk_nope_dim=128,
    qk_rope_dim=64,
    v_dim=128,
    fp8=True,
    router_bias=True,
)
DECODERS = {
    "kimi-k2": _KIMI_K2,
    "deepseek-v3.1": replace(_KIMI_K2, dense_layers=3, experts=256, vocab=129280, heads=128, predict_layers=1),
    "qwen3-235b-a22b": MoeDecoder(
        hidden=4096,
        layers=94,
        dense_layers=0,
        intermediate=12288,
        expert_intermediate=1536,
        experts=128,
        shared_experts=0,
        vocab=151936,
        heads=64,
        kv_heads=4,
        head_dim=128,
        qk_norm=True,
    ),
    "glm-4.5-air": MoeDecoder(
        hidden=4096,
        layers=46,
        dense_layers=1,
        intermediate=10944,
        expert_intermediate=1408,
        experts=128,
        shared_experts=1,
        vocab=151552,
        heads=96,
        kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        router_bias=True,
        predict_layers=1,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How many ranks share the attention, and how the experts. `expert_ranks` 0: experts are cut as the rest is.

    `tensor_ranks` 1 with experts dealt: every rank has the whole attention (data parallel).
    """

    tensor_ranks: int
    expert_ranks: int = 0

    @property
    def classes(self) -> int:
        """Ranks that need different slices."""
        return max(self.tensor_ranks, self.expert_ranks)


def manifest_of(cuts: list[Cut]) -> tuple[Manifest, list[Cut]]:
    """The checkpoint, and its tensors in the manifest's order."""
    ordered = sorted(cuts, key=lambda cut: cut.meta.name)
    return Manifest(tensors=tuple(cut.meta for cut in ordered)), ordered


def class_needs(cuts: list[Cut], parallelism: Parallelism, number: int) -> ClassNeeds:
    """What one class of ranks needs; `cuts` in the manifest's order."""
    experts = 1 + max((cut.expert for cut in cuts if cut.expert is not None), default=0)
    groups = parallelism.expert_ranks
    boxes: dict[Box, int] = {}
    tensors, parts = [], []
    known: dict[tuple[tuple[int, ...], int | None, int, bool], int] = {}
    for index, cut in enumerate(cuts):
        dealt = cut.expert is not None and groups > 0
        if cut.expert is not None and groups > 0 and cut.expert * groups // experts != number % groups:
            continue
        key = (cut.meta.shape, cut.dim, cut.heads, dealt)
        if key not in known:
            box = None if dealt else _box(cut, parallelism.tensor_ranks, number % parallelism.tensor_ranks)
            known[key] = WHOLE if box is None else boxes.setdefault(box, len(boxes))
        tensors.append(index)
        parts.append(known[key])
    return ClassNeeds(tensors=ints(tensors), parts=ints(parts), boxes=tuple(boxes))


def _box(cut: Cut, ranks: int, rank: int) -> Box | None:
    """The slice of a tensor-parallel rank; None for all."""
    if cut.dim is None or ranks == 1:
        return None
    return run_box(cut.meta.shape, cut.dim, ranks, rank, heads=cut.heads)


def run_box(shape: tuple[int, ...], dim: int, ranks: int, rank: int, *, heads: int = 0) -> Box:
    """A rank's run of one dimension. What does not divide goes in runs of the rounded-up length; `heads`: see Cut."""
    extent = shape[dim]
    if heads and heads < ranks:
        ranks, rank = heads, rank * heads // ranks
    run = -(-extent // ranks)
    first = min(rank * run, extent)
    start, size = [0] * len(shape), list(shape)
    start[dim], size[dim] = first, min(run, extent - first)
    return Box(start=tuple(start), shape=tuple(size))
