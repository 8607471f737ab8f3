"""Linear layers, embedding and norm, tensor parallel and fused as real engines have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_conformance.reference.loadable import CheckpointTensor, LoadableLayer, ShardId, copy_whole
from ckpt_conformance.reference.parallel import TpGroup

VOCAB_PADDING = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """What every layer is built with."""

    group: TpGroup
    dtype: torch.dtype
    device: torch.device
    quantise: bool = False


class ShardedLayer(LoadableLayer):
    """A layer that knows its rank."""

    def __init__(self, context: LayerContext, *, quantise: bool = False) -> None:
        super().__init__(dtype=context.dtype, device=context.device, quantise=quantise)
        self.group = context.group


class RMSNorm(ShardedLayer):
    """Root mean square norm over the last dimension, computed in float32; replicated."""

    def __init__(self, context: LayerContext, name: str, size: int, eps: float) -> None:
        super().__init__(context)
        self.name, self.size, self.eps = name, size, eps
        self.add_parameter("weight", (size,), copy_whole)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """One tensor."""
        yield CheckpointTensor(name=f"{self.name}.weight", layer=self, parameter="weight", shape=(self.size,))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., size]."""
        full = hidden.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.tensor("weight") * full.to(hidden.dtype)


class LogitScale(ShardedLayer):
    """A scalar that logits are multiplied by, and an order of its (no) columns, empty as in checkpoints without reordering."""

    def __init__(self, context: LayerContext) -> None:
        super().__init__(context)
        self.add_parameter("weight", (), copy_whole)
        self.add_parameter("g_idx", (0,), copy_whole)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Both."""
        for name, spec in self.specs.items():
            yield CheckpointTensor(name=f"logit_scale.{name}", layer=self, parameter=name, shape=spec.shape)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits, scaled."""
        return logits * self.tensor("weight").float()


class ReplicatedLinear(ShardedLayer):
    """The whole weight on every rank, never quantised (routers)."""

    def __init__(self, context: LayerContext, name: str, in_size: int, out_size: int) -> None:
        super().__init__(context)
        self.name, self.shape = name, (out_size, in_size)
        self.add_parameter("weight", self.shape, copy_whole)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """One tensor."""
        yield CheckpointTensor(name=f"{self.name}.weight", layer=self, parameter="weight", shape=self.shape)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] to [n, out]."""
        return self.linear(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPart:
    """One checkpoint tensor of a fused column-parallel weight.

    Attributes:
        name: of the module in the checkpoint, e.g. "q_proj".
        whole: its output rows, before sharding.
        start: first of the rows a rank takes, in the checkpoint tensor.
        offset: where they go in the fused parameter.
        rows: how many a rank takes.
    """

    name: str
    whole: int
    start: int
    offset: int
    rows: int


class FusedColumnLinear(ShardedLayer):
    """Several column-parallel weights in one parameter [sum of rows, in]; shard ids are checkpoint names."""

    def __init__(
        self, context: LayerContext, in_size: int, parts: tuple[FusedPart, ...], *, bias: bool = False
    ) -> None:
        super().__init__(context, quantise=context.quantise)
        self.in_size, self.has_bias = in_size, bias
        self.parts = {part.name: part for part in parts}
        rows = sum(part.rows for part in parts)
        shards: tuple[ShardId, ...] = tuple((name,) for name in self.parts)
        self.add_parameter("weight", (rows, in_size), self._load, shards, quantised=True)
        if bias:
            self.add_parameter("bias", (rows,), self._load, shards)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """One weight a part, and its bias."""
        for part in self.parts.values():
            sizes = {"weight": (part.whole, self.in_size)} | ({"bias": (part.whole,)} if self.has_bias else {})
            for parameter, shape in sizes.items():
                yield CheckpointTensor(
                    name=f"{part.name}.{parameter}",
                    layer=self,
                    parameter=parameter,
                    shape=shape,
                    shard_id=(part.name,),
                )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] to this rank's [n, rows]."""
        out = self.linear(rows)
        return out + self.tensor("bias") if self.has_bias else out

    def _load(self, parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
        part = self.parts[str(shard_id[0])]
        parameter.narrow(0, part.offset, part.rows).copy_(loaded.narrow(0, part.start, part.rows))


class QkvProjection(FusedColumnLinear):
    """q, k and v in one weight. With fewer KV heads than ranks, a KV head is replicated on several ranks."""

    def __init__(
        self, context: LayerContext, in_size: int, *, heads: int, kv_heads: int, head_dim: int, bias: bool
    ) -> None:
        group = context.group
        self.local_heads = group.shard(heads)
        self.local_kv_heads = max(1, kv_heads // group.size)
        kv_start = group.rank * kv_heads // group.size * head_dim
        queries, keys = self.local_heads * head_dim, self.local_kv_heads * head_dim
        query = FusedPart(name="q_proj", whole=heads * head_dim, start=group.rank * queries, offset=0, rows=queries)
        key = FusedPart(name="k_proj", whole=kv_heads * head_dim, start=kv_start, offset=queries, rows=keys)
        value = FusedPart(name="v_proj", whole=kv_heads * head_dim, start=kv_start, offset=queries + keys, rows=keys)
        super().__init__(context, in_size, (query, key, value), bias=bias)


class GateUpProjection(FusedColumnLinear):
    """gate and up of the MLP in one weight."""

    def __init__(self, context: LayerContext, in_size: int, inner: int) -> None:
        rows = context.group.shard(inner)
        parts = (
            FusedPart(name=name, whole=inner, start=context.group.rank * rows, offset=i * rows, rows=rows)
            for i, name in enumerate(("gate_proj", "up_proj"))
        )
        super().__init__(context, in_size, tuple(parts))


class RowParallelLinear(ShardedLayer):
    """Weight [out, in / tp]; the ranks' results are summed. The bias is added once, after the sum."""

    def __init__(self, context: LayerContext, name: str, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__(context, quantise=context.quantise)
        self.name, self.shape, self.has_bias = name, (out_size, in_size), bias
        self.columns = context.group.shard(in_size)
        self.add_parameter("weight", (out_size, self.columns), self._load, quantised=True)
        if bias:
            self.add_parameter("bias", (out_size,), copy_whole)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """The weight, and the bias."""
        yield CheckpointTensor(name=f"{self.name}.weight", layer=self, parameter="weight", shape=self.shape)
        if self.has_bias:
            yield CheckpointTensor(name=f"{self.name}.bias", layer=self, parameter="bias", shape=self.shape[:1])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's [n, in / tp] to the whole [n, out]."""
        out = self.group.all_reduce(self.linear(rows))
        return out + self.tensor("bias") if self.has_bias else out

    def _load(self, parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
        parameter.copy_(loaded.narrow(1, self.group.rank * self.columns, self.columns))


class VocabParallelEmbedding(ShardedLayer):
    """Embedding and head, rows split over ranks; zero rows pad the vocabulary to a multiple of 64 * tp."""

    def __init__(self, context: LayerContext, name: str, vocab: int, hidden: int) -> None:
        super().__init__(context)
        self.name, self.vocab, self.hidden = name, vocab, hidden
        multiple = VOCAB_PADDING * context.group.size
        self.rows = (vocab + multiple - 1) // multiple * VOCAB_PADDING
        self.first = context.group.rank * self.rows
        self.filled = max(0, min(self.rows, vocab - self.first))
        self.add_parameter("weight", (self.rows, hidden), self._load)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """One tensor."""
        yield CheckpointTensor(
            name=f"{self.name}.weight", layer=self, parameter="weight", shape=(self.vocab, self.hidden)
        )

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [n] to [n, hidden]."""
        weight = self.tensor("weight")
        if self.group.size == 1:
            return nn.functional.embedding(token_ids, weight)
        local = token_ids - self.first
        outside = (local < 0) | (local >= self.rows)
        rows = nn.functional.embedding(local.masked_fill(outside, 0), weight)
        return self.group.all_reduce(rows.masked_fill(outside.unsqueeze(-1), 0))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] to float32 [n, vocab], whole on every rank."""
        part = nn.functional.linear(rows, self.tensor("weight"))
        return self.group.all_gather(part)[..., : self.vocab]

    def _load(self, parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
        if self.filled:
            parameter.narrow(0, 0, self.filled).copy_(loaded.narrow(0, self.first, self.filled))
        parameter.narrow(0, self.filled, self.rows - self.filled).zero_()
