"""Proves, by one full update, that copies alone would have left the live model as the engine's loader left it.

A component is proved if all its parameters changed, every one of them holds exactly the recorded slices and constants, storage
stayed where it was, and nothing else of the model changed: no permuted block, no derived matrix, no moved expert.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_core.checksum import add, checksum
from ckpt_core.contract import LoadTensor
from ckpt_core.record.components import Component
from ckpt_core.record.pieces import taken_of
from ckpt_core.record.recording import Fill, Recording
from ckpt_core.record.watch import named_tensors, sums_of_others
from ckpt_core.strided import Strided

_MOST_TRIES = 3  # watching costs as much as several updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Attributes:
    proved: components that may be replayed from now on, also those of earlier updates.
    why_not: reason for each of the others, by one of its parameters.
    """

    proved: tuple[Component, ...]
    why_not: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doubt:
    """Why a component is not proved; `refutes` where the update speaks against it, and does not merely leave it open."""

    why: str
    refutes: bool = True


@dataclass(slots=True, kw_only=True)
class Proof:
    """Watches full updates of a model until one proved each component, or several did not.

    One may prove a part: an update that undoes another writes much of what is there already, and training leaves tensors as
    they are.
    """

    recording: Recording
    components: Sequence[Component]
    model: torch.nn.Module
    ignored: Collection[str]
    _tries: int = 0
    _proved: list[Component] = field(default_factory=list)
    _open: list[Component] = field(init=False)
    _arrived: dict[str, int] = field(default_factory=dict)
    _before: dict[str, int] = field(default_factory=dict)
    _others: dict[str, int] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)
    _dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._open = [component for component in self.components if not component.why_not]

    @property
    def worth_a_try(self) -> bool:
        """Whether another update may prove what the last ones did not."""
        return self._tries < _MOST_TRIES and bool(self._open)

    def begin(self) -> None:
        """Before the loader is called for the first time."""
        for sums in (self._arrived, self._before, self._places):
            sums.clear()
        named = named_tensors(self.model)
        for component in self._open:
            for name in component.parameters:
                self._before[name] = _sum_in_storage(named[name])
                self._places[name] = named[name].data_ptr()
        self._dtypes = {name: tensor.dtype for name, tensor in named.items()}
        self._others = self._sums_of_others()

    def arrived(self, item: LoadTensor) -> None:
        """A tensor, or a part of one, is about to be loaded."""
        copies = self.recording.copies_of.get(item.name, ())
        if not any(copy.parameter in self._before for copy in copies):
            return
        for copy in copies:
            if copy.parameter not in self._before:
                continue
            for part, source in taken_of(item, copy.source, self.recording.shapes[item.name]):
                destination = copy.destination.block(part)
                values = item.strided(source.size, source.stride, source.offset).view(copy.dtype)
                self._add(copy.parameter, checksum(values.to(self._dtypes[copy.parameter]), destination))

    def finish(self) -> Verdict:
        """After the loader and all processing are done."""
        self._tries += 1
        named = named_tensors(self.model)
        changed = sorted(name for name, value in self._sums_of_others().items() if self._others.get(name) != value)
        for fill in self.recording.fills:
            if fill.parameter in self._before:
                self._add(fill.parameter, _sum_of_fill(fill, named[fill.parameter]))
        if changed:  # something is derived from weights, whatever an update before left unseen
            self._proved = []
        why_not = {_name(component): component.why_not for component in self.components if component.why_not}
        unseen: list[Component] = []
        for component in self._open:
            doubts = (
                [_Doubt(why=f"{changed[0]} changed with the weights")] if changed else self._doubts(component, named)
            )
            if not doubts:
                self._proved.append(component)
                continue
            why_not[_name(component)] = doubts[0].why
            if not any(doubt.refutes for doubt in doubts):
                unseen.append(component)
        if self._proved:  # what speaks against a component counts for good, once there is something to replay
            self._open = unseen
        return Verdict(proved=tuple(self._proved), why_not=why_not)

    def _doubts(self, component: Component, named: dict[str, torch.Tensor]) -> list[_Doubt]:
        return [doubt for name in sorted(component.parameters) if (doubt := self._doubt(name, named))]

    def _doubt(self, name: str, named: dict[str, torch.Tensor]) -> _Doubt | None:
        now = named.get(name)
        if now is None or now.data_ptr() != self._places[name]:
            return _Doubt(why=f"{name} got other memory")
        value = _sum_in_storage(now)
        if value != self._arrived.get(name):
            return _Doubt(why=f"{name} is not what was copied into it")
        if value == self._before[name]:
            return _Doubt(why=f"{name} did not change: this update proves nothing about it", refutes=False)
        return None

    def _add(self, name: str, value: int) -> None:
        self._arrived[name] = add(self._arrived.get(name, 0), value)

    def _sums_of_others(self) -> dict[str, int]:
        return sums_of_others(self.model, self.recording.written, self.ignored)


def _name(component: Component) -> str:
    return min(component.parameters | component.roots)


def _sum_in_storage(live: torch.Tensor) -> int:
    """By where elements lie, as a replay writes them: the live parameter may have other strides than the recorded one."""
    return checksum(live, Strided(offset=0, size=tuple(live.shape), stride=tuple(live.stride())))


def _sum_of_fill(fill: Fill, live: torch.Tensor) -> int:
    region = fill.destination
    values = torch.full(region.size, fill.value, dtype=live.dtype, device=live.device)
    return checksum(values, region)
