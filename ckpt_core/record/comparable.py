"""What of a live model can be compared with a checkpoint: recorded copies whose places nobody changed since they were loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ckpt_core.contract import LoadTensor, RecordingTarget
from ckpt_core.incoming import TakenPart
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest
from ckpt_core.record.components import components
from ckpt_core.record.live import Home, LiveDigests, home_of
from ckpt_core.record.recording import Copy, Recording
from ckpt_core.record.replay import pulls_of
from ckpt_core.record.watch import named_tensors
from ckpt_core.strided import Strided
from ckpt_core.wire import PartOf


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparable:
    """Of one rank and one structure of checkpoints.

    Attributes:
        parts, homes: of the checkpoint, and where each lies in the live model.
        unchecked: other tensors that the loader takes, by the bytes that it takes of them and nobody can compare.
    """

    parts: tuple[PartOf, ...]
    homes: tuple[Home, ...]
    unchecked: Mapping[str, int]

    def digests(self) -> list[int]:
        """Of every part as it lives now, in order."""
        found = {id(home): digest for home, digest in LiveDigests(self.homes).found()}
        return [found[id(home)] for home in self.homes]


def comparable(target: RecordingTarget, recording: Recording, manifest: Manifest) -> Comparable:
    """Work it out. Nothing of the model is read."""
    live = _as_recorded(target)
    sound = _sound(target, recording, live)
    homes: list[Home] = []
    unchecked: dict[str, int] = {}
    for meta in manifest.tensors:
        if meta.name not in recording.needed:
            continue
        copies = [copy for copy in recording.copies_of.get(meta.name, ()) if copy.source.numel]
        found, rest = _homes(meta.shape, copies, live) if meta.name in sound else ([], copies)
        homes += found
        lost_bytes = sum(copy.source.numel for copy in rest) * meta.dtype.itemsize
        if rest or meta.name not in sound:
            unchecked[meta.name] = lost_bytes or meta.size_bytes
    parts = [_part_of(manifest, home) for home in homes]
    return Comparable(parts=tuple(parts), homes=tuple(homes), unchecked=unchecked)


def _as_recorded(target: RecordingTarget) -> dict[str, torch.Tensor]:
    """Live tensors of the form that the recorded loader wrote to."""
    recorded, live = named_tensors(target.model), named_tensors(target.live)
    return {
        name: tensor
        for name, tensor in live.items()
        if name in recorded and not tensor.is_meta and _form(tensor) == _form(recorded[name])
    }


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _sound(target: RecordingTarget, recording: Recording, live: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Checkpoint tensors of modules that hold what the loader copied there, once, and nothing computed."""
    sizes = {name: tensor.numel() for name, tensor in live.items()}
    found = components(recording, sizes, target.excluded, partly=True)
    return frozenset(root for component in found if not component.why_not for root in component.roots)


def _homes(
    shape: Sequence[int], copies: Sequence[Copy], live: Mapping[str, torch.Tensor]
) -> tuple[list[Home], list[Copy]]:
    """Where the copies of a checkpoint tensor lie, each by itself or all others together; and those that nobody can compare."""
    homes, rest = [], []
    for copy in copies:
        home = _home(shape, [copy], live)
        if home.complete():
            homes.append(home)
        else:
            rest.append(copy)
    if len(rest) > 1 and (joined := _home(shape, rest, live)).complete():
        return [*homes, joined], []
    return homes, rest


def _home(shape: Sequence[int], copies: Sequence[Copy], live: Mapping[str, torch.Tensor]) -> Home:
    box = _around([copy.source.box_in(shape) for copy in copies])
    item = LoadTensor(name=copies[0].root, box=None if box == Box.whole(shape) else box)
    pulls = [pull for copy in copies for pull in pulls_of(item, copy, live[copy.parameter], shape)]
    size_bytes = box.size * copies[0].dtype.itemsize
    part = TakenPart(0, item, Strided.whole(box.shape), whole=True, offset_bytes=0, size_bytes=size_bytes)
    return home_of(0, part, pulls)


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    start = tuple(map(min, *(box.start for box in boxes))) if len(boxes) > 1 else boxes[0].start
    stop = tuple(map(max, *(box.stop for box in boxes))) if len(boxes) > 1 else boxes[0].stop
    return Box(start=start, shape=tuple(end - first for first, end in zip(start, stop, strict=True)))


def _part_of(manifest: Manifest, home: Home) -> PartOf:
    item = home.part.item
    return PartOf(tensor=manifest.positions[item.name], box=item.box)
