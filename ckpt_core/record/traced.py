"""Tensors without data that remember which elements of the checkpoint they stand for.

A wrapper subclass around a meta tensor: it claims the engine's device and is seen in any thread (a loader may use a pool;
a dispatch mode would miss it). Views keep their origin, any other operation makes a derived value, and a write to a plain
tensor is handed to the tracer and not executed. vLLM's sharded_rdt and ModelExpress record loaders too, each for one transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed.tensor
from torch.utils._pytree import tree_leaves, tree_map

from ckpt_core.strided import Strided

_aten = torch.ops.aten
_ASKS_FOR_DATA = frozenset(
    {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default, _aten.item.default}
)
# change nothing about the values, only where they lie
_COPIES = frozenset({_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default, _aten.lift_fresh.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a storage holds: a checkpoint tensor (`root`), or the result of an operation on such."""

    root: str = ""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    operation: str = ""
    inputs: tuple[View, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Elements of an origin."""

    origin: Origin
    region: Strided
    dtype: torch.dtype

    def roots(self) -> Iterator[View]:
        """The views of checkpoint tensors that it was made of."""
        if self.origin.root:
            yield self
        for given in self.origin.inputs:
            yield from given.roots()

    def operations(self) -> list[str]:
        """What was done to these, last one first."""
        if self.origin.root:
            return []
        return [self.origin.operation, *(name for given in self.origin.inputs for name in given.operations())]

    def as_pure(self) -> View | None:
        """The same elements as a view of a checkpoint tensor; None where they were computed."""
        if self.origin.root:
            return self if self.dtype.itemsize == self.origin.dtype.itemsize else None
        if self.origin.operation or len(self.origin.inputs) != 1:
            return None
        (inner,) = self.origin.inputs
        pure = inner.as_pure()
        if pure is None or self.dtype != self.origin.dtype:
            return None
        region = self.region.through(self.origin.shape, pure.region)
        return None if region is None else View(origin=pure.origin, region=region, dtype=pure.dtype)


class Tracer(Protocol):
    """Who is asked what happens with traced tensors. May be called from any thread."""

    def on_copy(self, destination: torch.Tensor, source: Traced) -> None:
        """A traced tensor is to be copied into a plain one."""

    def on_data(self, operation: str, asked: Traced) -> Any:
        """A value is asked for."""

    def on_write(self, operation: str, destination: torch.Tensor, sources: Sequence[Traced]) -> None:
        """A plain tensor is to be written otherwise."""

    def on_lost(self, operation: str, lost: Traced) -> None:
        """A traced tensor was written to: what the others that share its storage hold is not known any more."""


class Traced(torch.Tensor):
    """See the module.

    Attributes:
        geometry: meta tensor of the same shape, strides and offset.
        origin: what its storage holds.
        tracer: see Tracer.
    """

    geometry: torch.Tensor
    origin: Origin
    tracer: Tracer
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Traced], inner: torch.Tensor, origin: Origin, tracer: Tracer, device: torch.device) -> Traced:
        made: Traced = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            requires_grad=False,
        )
        made.geometry, made.origin, made.tracer = inner, origin, tracer
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({self.origin.root or self.origin.operation}, {list(self.shape)}, {self.dtype})"

    @property
    def traced_view(self) -> View:
        """Which elements it stands for."""
        inner = self.geometry
        region = Strided(offset=int(inner.storage_offset()), size=tuple(inner.shape), stride=tuple(inner.stride()))
        return View(origin=self.origin, region=region, dtype=inner.dtype)

    def view_in(self, destination: torch.Tensor) -> View:
        """Which elements a copy into that tensor reads; one that adds dimensions in front repeats its source."""
        wide = self.expand(destination.shape) if self.shape != destination.shape else self
        assert isinstance(wide, Traced)
        return wide.traced_view

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _Call(func=func, args=tuple(args), kwargs=dict(kwargs or {})).run()


def traced(name: str, shape: Sequence[int], dtype: torch.dtype, *, tracer: Tracer, device: torch.device) -> Traced:
    """A checkpoint tensor without data, that claims to be on a device."""
    origin = Origin(root=name, shape=tuple(shape), dtype=dtype)
    return Traced(torch.empty(tuple(shape), dtype=dtype, device="meta"), origin, tracer, device)


@dataclass(slots=True, kw_only=True)
class _Call:
    """One operation with at least one traced argument."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Traced] = field(init=False)

    def __post_init__(self) -> None:
        self.given = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Traced)]

    def run(self) -> Any:
        """Its result."""
        tracer, name = self.given[0].tracer, str(self.func)
        if self.func is _aten.copy_.default and not isinstance(self.args[0], Traced):
            tracer.on_copy(self.args[0], self.args[1])
            return self.args[0]
        if self.func in _ASKS_FOR_DATA:
            return tracer.on_data(name, self.given[0])
        written = list(written_tensors(self.func, self.args, self.kwargs))
        for each in written:
            if isinstance(each, Traced):
                self._overwrite(each, name)
            else:
                tracer.on_write(name, each, self.given)
        if written:
            return result_of_write(self.func, written)
        return self._made(name)

    def _overwrite(self, written: Traced, name: str) -> None:
        """The loader changes a checkpoint tensor: from now on it is a derived value."""
        inner = written.geometry
        written.tracer.on_lost(name, written)  # other views of it do not know: nothing about it is sure any more
        views = tuple(each.traced_view for each in self.given)
        written.origin = Origin(operation=name, inputs=views, shape=tuple(inner.shape), dtype=inner.dtype)
        written.geometry = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")

    def _made(self, name: str) -> Any:
        device = self.kwargs.get("device") or self.given[0].device
        kwargs = {key: value for key, value in self.kwargs.items() if key != "pin_memory"}
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        result = self.func(*tree_map(_without_data, self.args), **tree_map(_without_data, kwargs))
        origins = {storage_id(each.geometry): each.origin for each in self.given}
        views = tuple(each.traced_view for each in self.given)

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            origin = origins.get(storage_id(leaf))
            if origin is None:
                copied = self.func in _COPIES and leaf.dtype == self.given[0].dtype and leaf.is_contiguous()
                operation = "" if copied else name
                origin = Origin(operation=operation, inputs=views, shape=tuple(leaf.shape), dtype=leaf.dtype)
            return Traced(leaf, origin, self.given[0].tracer, torch.device(device))

        return tree_map(wrap, result)


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, Traced):
        return leaf.geometry
    if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
        return leaf.to("meta")
    return leaf


def written_tensors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Arguments that an operation writes to, those in lists and by keyword included."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def result_of_write(func: Any, written: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What a caller gets back from a write that was not executed."""
    return written[0] if len(func._schema.returns) == 1 else None


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a storage: meta tensors all have address 0."""
    return int(tensor.untyped_storage()._cdata)
