"""Llama, Qwen3 and Qwen3-MoE decoders that load Hugging Face checkpoints into fused, sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from ckpt_conformance.reference.attention import Attention, RotaryTable
from ckpt_conformance.reference.config import ModelConfig
from ckpt_conformance.reference.draft import DraftHead
from ckpt_conformance.reference.experts import MoeBlock
from ckpt_conformance.reference.kv_cache import CacheShape, SequenceCache
from ckpt_conformance.reference.layers import (
    GateUpProjection,
    LayerContext,
    LogitScale,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from ckpt_conformance.reference.loadable import CheckpointTensor, LoadableLayer, seeded_values
from ckpt_core.errors import CoverageError


class Mlp(nn.Module):
    """SwiGLU with fused gate and up."""

    def __init__(self, context: LayerContext, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = GateUpProjection(context, hidden, inner)
        self.down_proj = RowParallelLinear(context, "down_proj", inner, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[t, hidden] to [t, hidden]."""
        gate, up = self.gate_up_proj(rows).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP (dense or experts), each behind a norm and beside a residual."""

    def __init__(self, context: LayerContext, config: ModelConfig, index: int, rotary: RotaryTable) -> None:
        super().__init__()
        eps, hidden = config.rms_norm_eps, config.hidden_size
        self.input_layernorm = RMSNorm(context, "input_layernorm", hidden, eps)
        self.self_attn = Attention(context, config, index, rotary)
        self.post_attention_layernorm = RMSNorm(context, "post_attention_layernorm", hidden, eps)
        if config.moe is not None and index in config.moe.sparse_layers:
            self.mlp: nn.Module = MoeBlock(context, hidden, config.moe)
        else:
            self.mlp = Mlp(context, hidden, config.intermediate_size)

    def forward(self, rows: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        """[t, hidden] to [t, hidden]."""
        rows = rows + self.self_attn(self.input_layernorm(rows), cache)
        return rows + self.mlp(self.post_attention_layernorm(rows))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embedding, layers and final norm: the checkpoint's "model"."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        rotary = RotaryTable(config, context)
        self.embed_tokens = VocabParallelEmbedding(context, "embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(context, config, i, rotary) for i in range(config.num_layers))
        self.norm = RMSNorm(context, "norm", config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        """Token ids [t] behind what the cache holds, to hidden states [t, hidden]; the cache grows by t."""
        cache.reserve(token_ids.shape[0])
        rows = self.embed_tokens(token_ids)
        for layer in self.layers:
            rows = layer(rows, cache)
        cache.advance(token_ids.shape[0])
        return self.norm(rows)  # type: ignore[no-any-return]


class CausalLM(nn.Module):
    """The whole model on one rank.

    Attributes:
        table: every checkpoint tensor it takes, by name, in model order.
        ignored: names of checkpoint tensors that it knows and has no use for.
    """

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        config.check_tp(context.group.size)
        self.config, self.context = config, context
        self.model = Decoder(context, config)
        self.lm_head = (
            self.model.embed_tokens
            if config.tied
            else VocabParallelEmbedding(context, "lm_head", config.vocab_size, config.hidden_size)
        )
        self.logit_scale = LogitScale(context) if config.scaled_logits else nn.Identity()
        self.draft = DraftHead(context, config.hidden_size) if config.draft_head else None
        self.table = {tensor.name: tensor for tensor in _named_tensors(self)}
        rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)}
        self.ignored = frozenset(rotary | ({"lm_head.weight"} if config.tied else set()))

    def forward(self, token_ids: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        """Token ids [t] behind what the cache holds, to float32 logits [t, vocab]."""
        return self.logits(self.model(token_ids, cache))

    def next_logits(self, token_ids: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        """As forward, for the last position only: [vocab]."""
        return self.logits(self.model(token_ids, cache)[-1:])[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, hidden] to float32 logits [n, vocab]."""
        return self.logit_scale(self.lm_head.logits(hidden))  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load whole checkpoint tensors. Keeps no reference to any of them.

        Returns:
            Names that were written; those in `ignored` are not among them.

        Raises:
            CoverageError: an unknown name, a wrong shape or dtype. What came before it is written.
        """
        loaded = set()
        for name, tensor in weights:
            self.check_weight(name, tensor)
            if name not in self.ignored:
                self.table[name].load(tensor)
                loaded.add(name)
        return loaded

    def check_weight(self, name: str, tensor: torch.Tensor) -> None:
        """Raise CoverageError where a tensor is unknown or of the wrong shape or dtype; touches nothing."""
        if name in self.ignored:
            return
        if name not in self.table:
            raise CoverageError(
                f"tensor {name!r} is not known to this {self.config.architecture}; "
                "check that the checkpoint is of this model"
            )
        self.table[name].check(tensor)

    def loadable_layers(self) -> Iterator[tuple[str, LoadableLayer]]:
        """Every layer with weights once, by module name."""
        for name, module in self.named_modules():
            if isinstance(module, LoadableLayer):
                yield name, module

    def fill_random(self, seed: int) -> None:
        """Random weights (`--load-format dummy`)."""
        for name, layer in self.loadable_layers():
            seeded_values(layer, name, seed=seed, rank=self.context.group.rank)

    def begin_reload(self) -> None:
        """Make ready for load_weights after the first start."""
        for _, layer in self.loadable_layers():
            layer.begin_reload()

    def process_weights_after_loading(self) -> None:
        """Quantise what was loaded, in place where it was quantised before.

        Raises:
            EngineStateError: only a part of a quantised module arrived.
        """
        for _, layer in self.loadable_layers():
            layer.process_weights_after_loading()

    def release(self) -> None:
        """Free all weights."""
        for _, layer in self.loadable_layers():
            layer.release()

    def allocate(self) -> None:
        """Allocate all weights again, contents undefined."""
        for _, layer in self.loadable_layers():
            layer.allocate()

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """Live storage by name: parameters, or the int8 and scale buffers of quantised ones."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix, layer in self.loadable_layers():
            for name, spec in layer.specs.items():
                held = layer._buffers if spec.quantised else layer._parameters
                keys = (f"{name}_int8", f"{name}_scale") if spec.quantised else (name,)
                tensors.update((f"{prefix}.{key}", value.data) for key in keys if (value := held.get(key)) is not None)
        return tensors

    def cache_shape(self) -> CacheShape:
        """Shape of the key and value memory this rank needs."""
        kv_heads = max(1, self.config.num_kv_heads // self.context.group.size)
        return CacheShape(
            layers=self.config.num_layers,
            kv_heads=kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.context.dtype,
            device=self.context.device,
        )


def _named_tensors(model: CausalLM) -> Iterator[CheckpointTensor]:
    for path, layer in model.loadable_layers():
        parent, _, _ = path.rpartition(".")
        for tensor in layer.checkpoint_tensors():
            yield replace(tensor, name=f"{parent}.{tensor.name}" if parent else tensor.name)
