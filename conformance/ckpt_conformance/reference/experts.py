"""Mixture of experts with packed weights.

w13 is [experts, 2 * inner / tp, hidden], w2 is [experts, hidden, inner / tp].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ckpt_conformance.reference.config import MoeConfig
from ckpt_conformance.reference.layers import LayerContext, ReplicatedLinear, ShardedLayer
from ckpt_conformance.reference.loadable import CheckpointTensor, ShardId


class FusedExperts(ShardedLayer):
    """All experts of a block. Every rank has a slice of each expert; shard ids are (expert, projection)."""

    def __init__(self, context: LayerContext, hidden: int, moe: MoeConfig) -> None:
        super().__init__(context, quantise=context.quantise)
        self.hidden, self.experts, self.whole = hidden, moe.num_experts, moe.intermediate_size
        self.inner = context.group.shard(self.whole)
        ids = range(self.experts)
        up_shards: tuple[ShardId, ...] = tuple((i, part) for i in ids for part in ("gate_proj", "up_proj"))
        down_shards: tuple[ShardId, ...] = tuple((i, "down_proj") for i in ids)
        w13, w2 = (self.experts, 2 * self.inner, hidden), (self.experts, hidden, self.inner)
        self.add_parameter("w13", w13, self._load_w13, up_shards, quantised=True)
        self.add_parameter("w2", w2, self._load_w2, down_shards, quantised=True)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Three tensors an expert."""
        for expert in range(self.experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                down = part == "down_proj"
                yield CheckpointTensor(
                    name=f"experts.{expert}.{part}.weight",
                    layer=self,
                    parameter="w2" if down else "w13",
                    shape=(self.hidden, self.whole) if down else (self.whole, self.hidden),
                    shard_id=(expert, part),
                )

    def forward(self, rows: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """rows [n, hidden], weights and chosen experts [n, k], to this rank's part of the sum [n, hidden]."""
        out = torch.zeros_like(rows)
        for expert in sorted(set(chosen.flatten().tolist())):
            row, slot = torch.where(chosen == expert)
            gate, up = self.linear(rows[row], "w13", expert).chunk(2, dim=-1)
            inner = nn.functional.silu(gate) * up
            out.index_add_(0, row, self.linear(inner, "w2", expert) * weights[row, slot, None])
        return out

    def _load_w13(self, parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
        expert, part = int(shard_id[0]), shard_id[1]
        target = parameter[expert].narrow(0, 0 if part == "gate_proj" else self.inner, self.inner)
        target.copy_(loaded.narrow(0, self.group.rank * self.inner, self.inner))

    def _load_w2(self, parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
        parameter[int(shard_id[0])].copy_(loaded.narrow(1, self.group.rank * self.inner, self.inner))


class MoeBlock(nn.Module):
    """Router and experts; the router is whole on every rank."""

    def __init__(self, context: LayerContext, hidden: int, moe: MoeConfig) -> None:
        super().__init__()
        self.group, self.moe = context.group, moe
        self.gate = ReplicatedLinear(context, "gate", hidden, moe.num_experts)
        self.experts = FusedExperts(context, hidden, moe)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] to [n, hidden]."""
        scores = nn.functional.softmax(self.gate(rows).float(), dim=-1)
        weights, chosen = scores.topk(self.moe.top_k, dim=-1)
        if self.moe.normalise_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.group.all_reduce(self.experts(rows, weights.to(rows.dtype), chosen))
