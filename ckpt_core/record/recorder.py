"""Runs an engine's own loader once, without data and without a write to live weights, and notes what it does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ckpt_core.contract import RecordingTarget
from ckpt_core.incoming import torch_dtype
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.record.recording import Copy, Fill, Recording
from ckpt_core.record.traced import Traced, result_of_write, storage_id, traced, written_tensors
from ckpt_core.strided import Strided

_FILLS = frozenset({torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default})
_MARK = 1.2345e-7  # what a loader gets that asks for a value; recognised where it is written


@dataclass(slots=True, kw_only=True)
class _Notes:
    """Implements Tracer.

    Attributes:
        places: parameter and its first element, by identity of its storage.
    """

    places: Mapping[int, tuple[str, int]]
    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    reaches: dict[str, set[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on_copy(self, destination: torch.Tensor, source: Traced) -> None:
        """See Tracer."""
        place = self._region(destination)
        pure = source.view_in(destination).as_pure()
        with self.lock:
            if place is None or pure is None:
                self._mark(source, "computed: " + ", ".join(source.traced_view.operations()), place)
                return
            parameter, region = place
            root = pure.origin.root
            self.copies.append(
                Copy(root=root, source=pure.region, dtype=pure.dtype, parameter=parameter, destination=region)
            )

    def on_data(self, operation: str, asked: Traced) -> Any:
        """See Tracer. A number that is recognised again where it is written."""
        with self.lock:
            self._mark(asked, f"its value is asked for ({operation})", None)
            self.asked += [view.origin.root for view in asked.traced_view.roots()]
            if not asked.is_floating_point():
                raise TypeError(f"the loader decides by the value of {self.asked[-1]!r}, which is not there yet")
            return _MARK * len(self.asked)

    def on_write(self, operation: str, destination: torch.Tensor, sources: Sequence[Traced]) -> None:
        """See Tracer."""
        with self.lock:
            for source in sources:
                self._mark(source, operation, self._region(destination))

    def on_lost(self, operation: str, lost: Traced) -> None:
        """See Tracer."""
        with self.lock:
            self._mark(lost, f"{operation} on a part of it", None)

    def on_fill(self, operation: Any, destination: torch.Tensor, value: Any) -> None:
        """A plain write to a parameter."""
        parameter, region = self._region(destination) or ("", None)
        if region is None:
            return
        with self.lock:
            number = float(value) if isinstance(value, int | float) else None
            asked = None if number is None else round(number / _MARK)
            if asked and 1 <= asked <= len(self.asked) and number == _MARK * asked:
                self.reaches.setdefault(self.asked[asked - 1], set()).add(parameter)
            elif operation in _FILLS and number is not None:
                self.fills.append(Fill(parameter=parameter, destination=region, value=number))
            else:
                self.reaches.setdefault("", set()).add(parameter)  # nobody knows what is written there

    def _mark(self, source: Traced, why: str, place: tuple[str, Strided] | None) -> None:
        for view in source.traced_view.roots():
            self.opaque.setdefault(view.origin.root, why)
            if place is not None:
                self.reaches.setdefault(view.origin.root, set()).add(place[0])

    def _region(self, tensor: torch.Tensor) -> tuple[str, Strided] | None:
        found = self.places.get(storage_id(tensor))
        if found is None:
            return None
        parameter, first = found
        offset = int(tensor.storage_offset()) - first
        return parameter, Strided(offset=offset, size=tuple(tensor.shape), stride=tuple(tensor.stride()))


class _PlainWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees writes to parameters that involve no checkpoint tensor, and keeps them from happening."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and not any(isinstance(leaf, Traced) for leaf in tree_leaves((args, kwargs))):
            written = list(written_tensors(func, args, kwargs))
            known = [tensor for tensor in written if storage_id(tensor) in self._notes.places]
            constant = 0 if func is torch.ops.aten.zero_.default else next(iter(args[1:]), None)
            for tensor in known:
                self._notes.on_fill(func, tensor, constant)
            if known:
                return result_of_write(func, known)
        return func(*args, **kwargs)


def record(target: RecordingTarget, manifest: Manifest, *, device: torch.device) -> Recording:
    """Run the loader of `target.load` on tensors of the manifest that have no data.

    Nothing is written to a parameter of `target.model`, also where its parameters are the live ones. A tensor over which the
    loader stumbles is opaque, and the loader is called again with those behind it.

    Args:
        device: that the tensors claim to be on, as those of a bucket are.
    """
    named = dict(target.model.named_parameters(remove_duplicate=False))
    named |= dict(target.model.named_buffers(remove_duplicate=False))
    places: dict[int, tuple[str, int]] = {}
    shared = {}
    for name, tensor in named.items():
        first = places.setdefault(storage_id(tensor), (name, int(tensor.storage_offset())))
        if first[0] != name:
            shared[name] = first[0]
    notes = _Notes(places=places)
    _run(target, list(manifest.tensors), notes, device)
    return Recording(
        shapes={meta.name: meta.shape for meta in manifest.tensors},
        sizes_bytes={meta.name: size for meta, size in zip(manifest.tensors, manifest.sizes_bytes, strict=True)},
        copies=tuple(copy for copy in notes.copies if copy.root not in notes.opaque),
        fills=tuple(notes.fills),
        opaque=dict(notes.opaque),
        reaches=_all_reached(notes),
        shared=shared,
    )


def _run(target: RecordingTarget, rest: list[TensorMeta], notes: _Notes, device: torch.device) -> None:
    while rest:
        taken = _Taken(rest, notes, device)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(_PlainWrites(notes))
                target.load(iter(taken))
        except Exception as error:
            if not taken.count:
                raise
            notes.opaque.setdefault(
                rest[taken.count - 1].name, f"the loader raised {type(error).__name__}: {error!s:.200}"
            )
            rest = rest[taken.count :]
        else:
            return


def _all_reached(notes: _Notes) -> dict[str, frozenset[str]]:
    """What a tensor that became opaque late was copied to before counts, too."""
    for copy in notes.copies:
        if copy.root in notes.opaque:
            notes.reaches.setdefault(copy.root, set()).add(copy.parameter)
    return {name: frozenset(parameters) for name, parameters in notes.reaches.items()}


class _Taken:
    """Makes tensors as the loader asks for them, and counts how many it took."""

    def __init__(self, tensors: list[TensorMeta], notes: _Notes, device: torch.device) -> None:
        self._tensors = tensors
        self._notes = notes
        self._device = device
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for meta in self._tensors:
            self.count += 1
            yield (
                meta.name,
                traced(meta.name, meta.shape, torch_dtype(meta.dtype), tracer=self._notes, device=self._device),
            )
