"""Rotary positions and attention of one sequence against its cache."""

from __future__ import annotations

import torch
from torch import nn

from ckpt_conformance.reference.config import ModelConfig
from ckpt_conformance.reference.kv_cache import SequenceCache
from ckpt_conformance.reference.layers import LayerContext, QkvProjection, RMSNorm, RowParallelLinear


class RotaryTable:
    """Cosines and sines of all positions [positions, head_dim]: constants of the config, not weights."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        angles = torch.outer(torch.arange(config.max_positions).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos = angles.cos().to(device=context.device, dtype=context.dtype)
        self.sin = angles.sin().to(device=context.device, dtype=context.dtype)

    def rotate(self, heads: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate [heads, t, head_dim], whose first token is at position `start`."""
        end = start + heads.shape[1]
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return heads * self.cos[start:end] + turned * self.sin[start:end]


class Attention(nn.Module):
    """Grouped-query attention with fused qkv; this rank's heads only."""

    def __init__(self, context: LayerContext, config: ModelConfig, index: int, rotary: RotaryTable) -> None:
        super().__init__()
        self.index, self.rotary, self.head_dim = index, rotary, config.head_dim
        heads_size = config.num_heads * config.head_dim
        self.qkv_proj = QkvProjection(
            context,
            config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
        )
        self.o_proj = RowParallelLinear(context, "o_proj", heads_size, config.hidden_size, bias=config.attention_bias)
        self.heads, self.kv_heads = self.qkv_proj.local_heads, self.qkv_proj.local_kv_heads
        self.q_norm, self.k_norm = (_head_norm(context, config, name) for name in ("q_norm", "k_norm"))

    def forward(self, rows: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        """[t, hidden] of one sequence's newest tokens to [t, hidden]."""
        tokens, start = rows.shape[0], cache.length
        heads = self.qkv_proj(rows).view(tokens, -1, self.head_dim)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        query = self.rotary.rotate(self.q_norm(query).transpose(0, 1), start)
        key = self.rotary.rotate(self.k_norm(key).transpose(0, 1), start)
        keys, values = cache.write(self.index, key, value.transpose(0, 1))
        out = nn.functional.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=causal_mask(tokens, start, rows.device),
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(out[0].transpose(0, 1).reshape(tokens, -1))  # type: ignore[no-any-return]


def _head_norm(context: LayerContext, config: ModelConfig, name: str) -> nn.Module:
    return RMSNorm(context, name, config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()


def causal_mask(tokens: int, start: int, device: torch.device) -> torch.Tensor | None:
    """Which of start + tokens keys each of the newest queries sees; None where one query sees all."""
    if tokens == 1:
        return None
    return torch.ones((tokens, start + tokens), dtype=torch.bool, device=device).tril(start)
