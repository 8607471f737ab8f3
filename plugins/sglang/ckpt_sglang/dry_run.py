"""What SGLang's own loader would do with a checkpoint, without a byte of it and without touching live weights.

The loader runs on a copy of the model that has shapes and no data, with tensors that have shapes and no data. A dispatch mode sees
which tensor is copied into which parameter. The idea is in vLLM's `sharded_rdt` engine and in ModelExpress; here it only answers
questions about names, shapes and dtypes, and nothing is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ckpt_core.dtypes import DType
from ckpt_core.incoming import torch_dtype

_NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Elements that went from checkpoint tensors into a parameter.

    Attributes:
        parameter: where to.
        sources: names of the checkpoint tensors; several where the loader put them together first.
        elements: how many.
        source_dtype, parameter_dtype: where they differ the loader casts.
    """

    parameter: str
    sources: frozenset[str]
    elements: int
    source_dtype: torch.dtype
    parameter_dtype: torch.dtype


@dataclass(slots=True, kw_only=True)
class DryRun:
    """What was seen.

    Attributes:
        copies: in order.
        written_sources: checkpoint tensors that the loader writes to itself.
        errors: the loader's error by the name it had last taken.
        filled: elements of each parameter that checkpoint tensors were copied to.
        padded: elements of each parameter that the loader filled with constants.
    """

    copies: list[Copy] = field(default_factory=list)
    written_sources: set[str] = field(default_factory=set)
    errors: dict[str, Exception] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    padded: dict[str, int] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Follows tensors by their storages: views share them, everything else that is made of them is noted."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], seen: DryRun) -> None:
        super().__init__()
        self._parameters = {_storage(tensor): name for name, tensor in parameters.items()}
        self._sources: dict[int, frozenset[str]] = {}
        self._roots: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # a storage that is gone could give its address to another
        self._seen = seen

    def track(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Follow a checkpoint tensor."""
        self._alive.append(tensor)
        self._sources[_storage(tensor)] = frozenset({name})
        self._roots[_storage(tensor)] = name
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and _storage(args[0]) in self._parameters:
            self._note_copy(args[0], args[1])
            return args[0]
        used = self._sources_of((args, kwargs))
        if used:
            if func is torch.ops.aten._to_copy.default:
                kwargs = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
            self._note_write(func, args)
        made = func(*args, **kwargs)
        if used:
            self._follow(made, used)
        elif func._schema.is_mutable and isinstance(made, torch.Tensor) and _storage(made) in self._parameters:
            self._count(self._seen.padded, made)
        return made

    def _note_copy(self, parameter: torch.Tensor, source: torch.Tensor) -> None:
        lengths = [1] * (parameter.dim() - source.dim()) + list(source.shape)  # a copy adds dimensions in front
        if lengths != list(parameter.shape):
            raise ValueError(f"expected {list(parameter.shape)}, got {list(source.shape)}")
        sources = self._sources_of(source)
        name = self._count(self._seen.filled if sources else self._seen.padded, parameter)
        if sources:
            copy = Copy(
                parameter=name,
                sources=sources,
                elements=source.numel(),
                source_dtype=source.dtype,
                parameter_dtype=parameter.dtype,
            )
            self._seen.copies.append(copy)

    def _count(self, elements: dict[str, int], part: torch.Tensor) -> str:
        name = self._parameters[_storage(part)]
        elements[name] = elements.get(name, 0) + part.numel()
        return name

    def _note_write(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, torch.Tensor) and _storage(value) in self._roots:
                self._seen.written_sources.add(self._roots[_storage(value)])

    def _follow(self, made: Any, used: frozenset[str]) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._parameters:
                self._alive.append(tensor)
                self._sources[_storage(tensor)] = self._sources.get(_storage(tensor), _NO_NAMES) | used

    def _sources_of(self, values: Any) -> frozenset[str]:
        found = _NO_NAMES
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                found |= self._sources.get(_storage(value), _NO_NAMES)
        return found


def dry_run(model: Any, tensors: Iterable[tuple[str, tuple[int, ...], DType]]) -> DryRun:
    """Load a checkpoint's names, shapes and dtypes into a model without data.

    Args:
        model: all parameters on the meta device, of the shapes that are loaded.
        tensors: in any order; after one that the loader stumbles over, it goes on with the next.
    """
    seen = DryRun()
    parameters = dict(model.named_parameters())
    rest = list(tensors)
    with torch.no_grad(), _Watch(parameters, seen) as watch:
        while rest:
            taken = _Taken(watch, rest)
            try:
                model.load_weights(taken)
                break
            except Exception as error:
                if not taken.count:
                    raise
                seen.errors[rest[taken.count - 1][0]] = error
                rest = rest[taken.count :]
    return seen


class _Taken:
    """Makes tensors as the loader asks for them, and counts how many it took."""

    def __init__(self, watch: _Watch, tensors: list[tuple[str, tuple[int, ...], DType]]) -> None:
        self._watch = watch
        self._tensors = tensors
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape, dtype in self._tensors:
            self.count += 1
            # loaders ask one-element tensors for their value
            device = "meta" if math.prod(shape) > 1 else "cpu"
            made = torch.zeros(shape, dtype=torch_dtype(dtype), device=device)
            yield name, self._watch.track(name, made)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
