"""Parameters that take their part of a checkpoint tensor, and layers that quantise them after loading."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ckpt_core.errors import CoverageError, EngineStateError

ShardId = tuple[str | int, ...]
WeightLoader = Callable[[torch.Tensor, torch.Tensor, ShardId], None]


class LoadableParameter(nn.Parameter):
    """A parameter with the `weight_loader(param, loaded, shard_id)` that writes a tensor's part into it."""

    weight_loader: WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTensor:
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: in the checkpoint; inside a layer relative to the parent module, in the model's table whole.
        layer: the layer that holds its parameter.
        parameter: the parameter's name in the layer.
        shard_id: which part of a fused parameter it is; () where the parameter is not fused.
        shape: of the whole tensor, before sharding.
    """

    name: str
    layer: LoadableLayer
    parameter: str
    shape: tuple[int, ...]
    shard_id: ShardId = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it must have."""
        return self.layer.dtype

    @property
    def group(self) -> str:
        """The parent module, whose tensors must land together: "model.layers.3.self_attn"."""
        parts = self.name.split(".")[:-2]
        return ".".join(parts[: parts.index("experts")] if "experts" in parts else parts)

    def check(self, loaded: torch.Tensor) -> None:
        """Raise CoverageError where shape or dtype is wrong."""
        expected, got = describe(self.dtype, self.shape), describe(loaded.dtype, tuple(loaded.shape))
        if expected != got:
            raise CoverageError(
                f"tensor {self.name!r}: expected {expected}, got {got}; check that the checkpoint is of this "
                "model and was saved in the engine's dtype"
            )

    def load(self, loaded: torch.Tensor) -> None:
        """Write this rank's part. Keeps no reference to `loaded`.

        Raises:
            CoverageError: wrong shape or dtype; nothing was written.
        """
        self.check(loaded)
        self.layer.load(self.parameter, loaded, self.shard_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """How to make a parameter: shape on this rank, loader, the shards that complete it."""

    shape: tuple[int, ...]
    loader: WeightLoader
    shards: frozenset[ShardId]
    quantised: bool


class LoadableLayer(nn.Module):
    """A layer whose parameters are loaded, then perhaps quantised into storage whose addresses never change.

    Without quantisation the loadable parameter is the live one. With it, loading makes the full-precision
    parameter again, and `process_weights_after_loading` writes it into the same int8 storage as before and
    frees it.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device, quantise: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.quantise = quantise
        self.specs: dict[str, ParameterSpec] = {}
        self._arrived: dict[str, set[ShardId]] = {}

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        loader: WeightLoader,
        shards: Iterator[ShardId] | tuple[ShardId, ...] = ((),),
        *,
        quantised: bool = False,
    ) -> None:
        """Declare a parameter and allocate it. `quantised` only matters in a layer that quantises."""
        spec = ParameterSpec(
            shape=shape, loader=loader, shards=frozenset(shards), quantised=quantised and self.quantise
        )
        self.specs[name] = spec
        self._arrived[name] = set()
        self._materialise(name)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """The checkpoint's tensors that this layer takes, by names relative to its parent."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        """A live full-precision parameter."""
        value = self._parameters[name]
        assert value is not None, f"{type(self).__name__}.{name} is not materialised"
        return value

    def linear(self, rows: torch.Tensor, name: str = "weight", index: int | None = None) -> torch.Tensor:
        """rows [n, in] times the transposed weight [out, in] (or expert `index` of [experts, out, in])."""
        if not self.specs[name].quantised:
            weight = self.tensor(name)
            return nn.functional.linear(rows, weight if index is None else weight[index])
        packed, scale = self._buffers[f"{name}_int8"], self._buffers[f"{name}_scale"]
        assert packed is not None, f"{name} was never quantised"
        assert scale is not None
        if index is not None:
            packed, scale = packed[index], scale[index]
        return nn.functional.linear(rows, packed.to(rows.dtype)) * scale.squeeze(-1).to(rows.dtype)

    def load(self, name: str, loaded: torch.Tensor, shard_id: ShardId) -> None:
        """Write one checkpoint tensor into a parameter, made anew where it was freed."""
        self._materialise(name)
        parameter = self._parameters[name]
        assert isinstance(parameter, LoadableParameter)
        with torch.no_grad():
            parameter.weight_loader(parameter.data, loaded, shard_id)
        self._arrived[name].add(shard_id)

    def mark_loaded(self) -> None:
        """Take what the parameters hold now as loaded (random start)."""
        for name, spec in self.specs.items():
            self._arrived[name] = set(spec.shards)

    def begin_reload(self) -> None:
        """Forget what arrived, and any half-loaded parameter."""
        self.discard_loadable()
        for arrived in self._arrived.values():
            arrived.clear()

    def process_weights_after_loading(self) -> None:
        """Quantise what arrived. Parameters of which nothing arrived stay as they are (a partial update).

        Raises:
            EngineStateError: only some shards of a quantised parameter arrived.
        """
        for name, spec in self.specs.items():
            if spec.quantised and self._arrived[name]:
                self._check_complete(name)
                self._store_quantised(name, *quantise_rows(self.tensor(name)))
        self.discard_loadable()

    def discard_loadable(self) -> None:
        """Free full-precision parameters that have quantised storage beside them."""
        for name, spec in self.specs.items():
            if spec.quantised and self._buffers.get(f"{name}_int8") is not None:
                self._parameters[name] = None

    def release(self) -> None:
        """Free all storage (sleep)."""
        for name in self.specs:
            self._parameters[name] = None
            for suffix in ("int8", "scale"):
                self._buffers.pop(f"{name}_{suffix}", None)

    def allocate(self) -> None:
        """Allocate live storage again, contents undefined (wake)."""
        for name, spec in self.specs.items():
            self._arrived[name].clear()
            if spec.quantised:
                packed = torch.empty(spec.shape, dtype=torch.int8, device=self.device)
                scale = torch.empty((*spec.shape[:-1], 1), dtype=torch.float32, device=self.device)
                self._store_quantised(name, packed, scale)
            else:
                self._materialise(name)

    def _materialise(self, name: str) -> None:
        if self._parameters.get(name) is not None:
            return
        spec = self.specs[name]
        data = torch.empty(spec.shape, dtype=self.dtype, device=self.device)
        parameter = LoadableParameter(data, requires_grad=False)
        parameter.weight_loader = spec.loader
        self.register_parameter(name, parameter)

    def _store_quantised(self, name: str, packed: torch.Tensor, scale: torch.Tensor) -> None:
        for key, value in ((f"{name}_int8", packed), (f"{name}_scale", scale)):
            stored = self._buffers.get(key)
            if stored is None:
                self.register_buffer(key, value)
            else:
                # the same storage as before: addresses may be baked into captured graphs
                stored.copy_(value)

    def _check_complete(self, name: str) -> None:
        lacking = self.specs[name].shards - self._arrived[name]
        if lacking:
            raise EngineStateError(
                f"{type(self).__name__}.{name} is quantised as a whole, and {len(lacking)} of its "
                f"{len(self.specs[name].shards)} parts did not arrive ({sorted(lacking, key=str)[:4]}); "
                "send all tensors of a module in one update"
            )


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per output channel: weight [..., out, in] to int8 and float32 scale [..., out, 1]."""
    full = weight.detach().float()
    scale = full.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-8) / 127.0
    return (full / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """A tensor in a message: "BF16 [256, 128]"."""
    return f"{_dtype_name(dtype)} {list(shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    from ckpt_core.dtypes import DType

    try:
        return str(DType.from_torch_name(str(dtype)).value)
    except KeyError:
        return str(dtype)


def copy_whole(parameter: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
    """Loader of a replicated parameter."""
    assert shard_id == ()
    parameter.copy_(loaded)


def seeded_values(layer: LoadableLayer, prefix: str, *, seed: int, rank: int) -> None:
    """Fill a layer with random weights of a sane size, the same at every start with the same seed.

    One-dimensional and replicated parameters get the same values on every rank.
    """
    for name, spec in layer.specs.items():
        owner = "all" if spec.loader is copy_whole else str(rank)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{owner}:{prefix}.{name}".encode()))
        data = layer.tensor(name).data
        if len(spec.shape) <= 1:
            data.copy_(torch.empty(spec.shape).uniform_(0.9, 1.1, generator=generator))
            continue
        bound = (3.0 / spec.shape[-1]) ** 0.5
        values = torch.empty(spec.shape, dtype=layer.dtype).uniform_(-bound, bound, generator=generator)
        data.copy_(values)
    layer.mark_loaded()
