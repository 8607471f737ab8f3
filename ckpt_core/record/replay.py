"""Copies straight from the ring into live parameters, as recorded: the engine's loader is not asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ckpt_core.contract import LoadTensor
from ckpt_core.record.pieces import taken_of
from ckpt_core.record.recording import Copy, Recording
from ckpt_core.strided import Strided, row_major


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """One copy: elements of the piece, counted from its first, and where they go.

    Attributes:
        dense: both ends are contiguous and of one type.
    """

    item: LoadTensor
    source: Strided
    dtype: torch.dtype
    destination: torch.Tensor
    dense: bool


class Replay:
    """Of one live model. Destinations are views of its parameters, made once.

    Args:
        parameters: live ones by name.
        roots: checkpoint tensors that are replayed.
    """

    def __init__(self, recording: Recording, parameters: dict[str, torch.Tensor], roots: Collection[str]) -> None:
        self.roots = frozenset(roots)
        self._recording = recording
        self._parameters = parameters
        self._known: dict[int, tuple[tuple[LoadTensor, ...], list[Pull]]] = {}
        self._places = {name: _place(tensor) for name, tensor in parameters.items()}

    def holds_for(self, parameters: dict[str, torch.Tensor]) -> bool:
        """Whether all parameters that it writes are where they were."""
        return all(name in parameters and _place(parameters[name]) == place for name, place in self._places.items())

    def fill(self) -> None:
        """Write the recorded constants."""
        for fill in self._recording.fills:
            if fill.parameter in self._parameters:
                where = fill.destination
                _region(self._parameters[fill.parameter], where).fill_(fill.value)

    def pulls(self, index: int, items: tuple[LoadTensor, ...]) -> list[Pull]:
        """Copies of these pieces, bucket `index` of the plan, worked out once."""
        known, pulls = self._known.get(index, ((), []))
        if known is not items:
            pulls = [pull for item in items for pull in self._pulls(item)]
            self._known[index] = (items, pulls)
        return pulls

    def load(self, index: int, items: tuple[LoadTensor, ...]) -> int:
        """Pull what the parameters need of these pieces, bucket `index` of the plan. Bytes read."""
        pulls = self.pulls(index, items)
        if not pulls:
            return 0
        dense: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        size_bytes = 0
        with torch.no_grad(), _on(pulls[0].destination.device):
            for pull in pulls:
                source = _source(pull)
                size_bytes += source.numel() * source.element_size()
                if pull.dense:
                    destinations, sources = dense.setdefault(pull.dtype, ([], []))
                    destinations.append(pull.destination)
                    sources.append(source)
                else:  # one strided tensor, or another type, in a batch would send the whole batch down the slow road
                    pull.destination.copy_(source, non_blocking=True)
            for batch in dense.values():
                torch._foreach_copy_(*batch, non_blocking=True)
        return size_bytes

    def _pulls(self, item: LoadTensor) -> list[Pull]:
        return [
            pull
            for copy in self._recording.copies_of[item.name]
            for pull in pulls_of(item, copy, self._parameters[copy.parameter], self._recording.shapes[item.name])
        ]


def pulls_of(item: LoadTensor, copy: Copy, parameter: torch.Tensor, shape: Sequence[int]) -> list[Pull]:
    """What a recorded copy takes of a piece, and where it goes in the live parameter. `shape`: of the whole tensor."""
    return [
        _pull(item, source, copy.dtype, parameter, copy.destination.block(part))
        for part, source in taken_of(item, copy.source, shape)
    ]


def _pull(item: LoadTensor, source: Strided, dtype: torch.dtype, parameter: torch.Tensor, where: Strided) -> Pull:
    destination = _region(parameter, where)
    row_by_row = destination.is_contiguous() and source.stride == row_major(source.size)
    dense = row_by_row and destination.stride() == source.stride and destination.dtype == dtype
    return Pull(item=item, source=source, dtype=dtype, destination=destination, dense=dense)


def _source(pull: Pull) -> torch.Tensor:
    region = pull.source
    found = pull.item.strided(region.size, region.stride, region.offset)
    return found if found.dtype == pull.dtype else found.view(pull.dtype)


def _region(parameter: torch.Tensor, region: Strided) -> torch.Tensor:
    first = int(parameter.storage_offset())
    return parameter.detach().as_strided(region.size, region.stride, first + region.offset)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _on(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
