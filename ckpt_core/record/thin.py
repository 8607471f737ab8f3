"""Checkpoint tensors that have only the slices which an engine's loader was seen to take.

An engine that keeps what it is given until a module is complete keeps no more than its own part then. The loader works on it as
on a whole tensor; the copy into a plain tensor, whenever it comes, takes the slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckpt_core.contract import LoadTensor
from ckpt_core.errors import EngineError
from ckpt_core.record.recording import Recording
from ckpt_core.record.traced import Traced, traced
from ckpt_core.strided import Strided


class Slices:
    """What a thin tensor has. Implements Tracer.

    Attributes:
        size_bytes: of all slices.
    """

    def __init__(self, name: str, slices: dict[tuple[Strided, torch.dtype], torch.Tensor]) -> None:
        self._name = name
        self._slices = slices
        self.size_bytes = sum(part.numel() * part.element_size() for part in slices.values())

    def on_copy(self, destination: torch.Tensor, source: Traced) -> None:
        """See Tracer."""
        if destination.is_meta:
            return  # somebody counts what would be copied
        pure = source.view_in(destination).as_pure()
        found = None if pure is None else self._slices.get((pure.region, pure.dtype))
        if found is None:
            raise self._strange("copies another slice than before")
        destination.copy_(found)

    def on_data(self, operation: str, asked: Traced) -> Any:
        """See Tracer."""
        raise self._strange(f"asks for a value ({operation})")

    def on_write(self, operation: str, destination: torch.Tensor, sources: Sequence[Traced]) -> None:
        """See Tracer."""
        raise self._strange(f"computes with it ({operation})")

    def on_lost(self, operation: str, lost: Traced) -> None:
        """See Tracer."""
        raise self._strange(f"writes to it ({operation})")

    def _strange(self, what: str) -> EngineError:
        return EngineError(
            f"tensor {self._name!r}: the engine's loader {what}, which it did not do when it was recorded; update with --no-replay"
        )


def thin(item: LoadTensor, recording: Recording) -> LoadTensor:
    """A whole tensor as one that owns copies of just the recorded slices. What is opaque or a part stays as it is."""
    copies = recording.copies_of.get(item.name, ())
    if not copies or item.box is not None or not item.tensor.dim():
        return item
    whole = item.tensor
    slices = {}
    for copy in copies:
        region = copy.source
        found = item.strided(region.size, region.stride, region.offset).view(copy.dtype)
        slices[region, copy.dtype] = found.clone(memory_format=torch.contiguous_format)
    made = traced(item.name, whole.shape, whole.dtype, tracer=Slices(item.name, slices), device=whole.device)
    return LoadTensor(name=item.name, tensor=made)


def retained_bytes(tensor: torch.Tensor) -> int | None:
    """Bytes that a thin tensor owns; None of any other tensor."""
    if isinstance(tensor, Traced) and isinstance(tensor.tracer, Slices):
        return tensor.tracer.size_bytes
    return None
