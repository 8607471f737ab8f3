"""One update through the hooks of one worker, step by step, as the core's own worker loop would do it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from ckpt_conformance.checks.checkpoints import Checkpoint
from ckpt_core.contract import AbortOutcome, DeviceKind, LoadBucket, LoadReport, LoadTensor, Update
from ckpt_core.layout import Box, LayoutEntry, whole_layout
from ckpt_core.plugins import EnginePlugin

TENSORS_PER_BUCKET = 5  # cuts across modules in every tiny model: a group is seldom in one bucket
_ALIGN_BYTES = 256
_serial = itertools.count(1)
Items: TypeAlias = Sequence[tuple[str, torch.Tensor, Box | None]]
Arrange: TypeAlias = Callable[[list[LayoutEntry]], list[LayoutEntry]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A bucket and the memory that its tensors are views of.

    Attributes:
        memory: uint8, as a ring would hold it.
        alive: dead once nobody refers to the memory any more; None where the device cannot tell.
    """

    bucket: LoadBucket
    memory: torch.Tensor
    alive: weakref.ref[Any] | None


class Attempt:
    """One update of one worker.

    Args:
        tensors_per_bucket: how many travel together; 0 for all in one bucket.
        names: only these tensors are sent and expected (a partial update); None for all.
        arrange: another order of the layout's entries.
    """

    def __init__(
        self,
        plugin: EnginePlugin,
        worker: Any,
        checkpoint: Checkpoint,
        *,
        tensors_per_bucket: int = TENSORS_PER_BUCKET,
        names: Collection[str] | None = None,
        arrange: Arrange | None = None,
    ) -> None:
        self._hook, self._plugin, self._worker = plugin.hook, plugin, worker
        self._device = device_of(plugin, worker)
        self.update = Update(
            update_id=f"check-{next(_serial)}",
            version=checkpoint.path.name,
            digest=checkpoint.manifest.structure_digest,
            expected=frozenset(checkpoint.tensors if names is None else names),
            partial=names is not None,
        )
        entries = self._entries(checkpoint, names)
        entries = arrange(entries) if arrange else entries
        half = (len(entries) + 1) // 2  # two buckets at least: checks of what happens between them need a second
        step = max(1, min(tensors_per_bucket, half) if tensors_per_bucket else len(entries))
        self.batches = [
            [_item(entry, checkpoint) for entry in entries[i : i + step]] for i in range(0, len(entries), step)
        ]

    def begin(self) -> None:
        """ckpt_begin."""
        self._hook.ckpt_begin(worker=self._worker, update=self.update)

    def deliver(self, items: Items, *, index: int = 0) -> Delivery:
        """Put tensors into memory of their own, as a bucket."""
        return pack(items, index=index, device=self._device)

    def load(self, index: int) -> LoadReport:
        """ckpt_load of one of the batches."""
        return self.load_bucket(self.deliver(self.batches[index], index=index).bucket)

    def load_bucket(self, bucket: LoadBucket) -> LoadReport:
        """ckpt_load of any bucket."""
        report: LoadReport = self._hook.ckpt_load(worker=self._worker, update=self.update, bucket=bucket)
        return report

    def load_all(self) -> list[LoadReport]:
        """ckpt_load of every batch. The memory stays as it is until the end: what a reused ring does is a check of its own."""
        deliveries = [self.deliver(batch, index=index) for index, batch in enumerate(self.batches)]
        return [self.load_bucket(delivery.bucket) for delivery in deliveries]

    def finish(self) -> None:
        """ckpt_finish."""
        self._hook.ckpt_finish(worker=self._worker, update=self.update)

    def commit(self) -> None:
        """What a commit means to a plugin: the guard is disarmed."""
        self._hook.ckpt_poison(worker=self._worker, cause=None)

    def abort(self, cause: str = "a check aborts it") -> AbortOutcome:
        """ckpt_abort."""
        outcome: AbortOutcome = self._hook.ckpt_abort(worker=self._worker, update=self.update, cause=cause)
        return outcome

    def run(self) -> None:
        """From begin to commit."""
        self.begin()
        self.load_all()
        self.finish()
        self.commit()

    def _entries(self, checkpoint: Checkpoint, names: Collection[str] | None) -> list[LayoutEntry]:
        layout = self._hook.ckpt_layout(worker=self._worker, manifest=checkpoint.manifest)
        layout = layout or whole_layout(checkpoint.manifest)
        wanted = [entry for entry in layout.entries if names is None or entry.tensor in names]
        return list(_in_groups(wanted))


def pack(items: Items, *, index: int, device: torch.device) -> Delivery:
    """Copy tensors (name, tensor, box or None) into new memory and make a bucket of views."""
    offsets = list(itertools.accumulate((_aligned(tensor.nbytes) for _, tensor, _ in items), initial=0))
    memory, alive = _allocate(offsets[-1], device)
    views = []
    for (name, tensor, box), offset in zip(items, offsets[:-1], strict=True):
        view = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        views.append(LoadTensor(name=name, tensor=view, box=box))
    return Delivery(bucket=LoadBucket(index=index, tensors=tuple(views)), memory=memory, alive=alive)


def device_of(plugin: EnginePlugin, worker: Any) -> torch.device:
    """Where the worker's buckets must be."""
    info = plugin.hook.ckpt_identify(worker=worker)
    return torch.device("cpu") if info.device_kind is DeviceKind.CPU else torch.device("cuda", info.device_index)


def _allocate(size_bytes: int, device: torch.device) -> tuple[torch.Tensor, weakref.ref[Any] | None]:
    if device.type != "cpu":
        return torch.empty(size_bytes, dtype=torch.uint8, device=device), None
    # torch holds the array for as long as any tensor uses its memory, in Python or below
    array = np.empty(size_bytes, dtype=np.uint8)
    return torch.from_numpy(array), weakref.ref(array)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _in_groups(entries: Sequence[LayoutEntry]) -> Iterator[LayoutEntry]:
    """Groups in one go, as the core promises; in the order in which the layout first names them."""
    groups: dict[str, list[LayoutEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.group or entry.tensor, []).append(entry)
    for group in groups.values():
        yield from group


def _item(entry: LayoutEntry, checkpoint: Checkpoint) -> tuple[str, torch.Tensor, Box | None]:
    tensor = checkpoint.tensors[entry.tensor]
    return entry.tensor, tensor if entry.box is None else tensor[entry.box.slices], entry.box
