"""From bytes in a ring to the engine's loader: one bucket at a time, digested, as views, and accounted for."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_core.bucket import Piece
from ckpt_core.contract import LoadBucket, LoadReport, LoadTensor, Update
from ckpt_core.dtypes import DType
from ckpt_core.errors import CoverageError
from ckpt_core.layout import Box, Layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import Plan, Step
from ckpt_core.plugins import EnginePlugin
from ckpt_core.transport.base import RingReader
from ckpt_core.verify import ArrivalDigest

if TYPE_CHECKING:
    import torch


class Incoming:
    """What one rank takes out of each bucket, looked up before the clock runs: of a bucket that it shares with other ranks,
    only the pieces that touch its own layout.
    """

    def __init__(self, plan: Plan, receiver: int, manifest: Manifest, layout: Layout) -> None:
        boxes: dict[int, list[Box | None]] = {}
        for entry in layout.entries:
            boxes.setdefault(manifest.index_of(entry.tensor), []).append(entry.box)
        self._pieces = {
            step.index: tuple(
                (piece, manifest.tensors[piece.tensor])
                for piece in step.bucket.pieces
                if _touches(piece, boxes.get(piece.tensor, []))
            )
            for step in plan.steps
            if receiver in step.receivers
        }
        self.names = frozenset(meta.name for pieces in self._pieces.values() for _, meta in pieces)

    def of(self, step: Step) -> tuple[tuple[Piece, TensorMeta], ...]:
        """Pieces of a step's bucket that the rank takes."""
        return self._pieces[step.index]


def _touches(piece: Piece, boxes: list[Box | None]) -> bool:
    return any(box is None or piece.box is None or not box.disjoint(piece.box) for box in boxes)


class Applier:
    """Gives one rank its buckets.

    Args:
        digests: content of the checkpoint's tensors, in the order of its manifest; None to digest nothing.

    Attributes:
        received_bytes, retained_bytes: so far; retained is the peak of what the engine reported.
        load_s, digest_s: seconds in the plugin's load hook, and in digests.
        ignored: names the engine had no use for.
    """

    def __init__(
        self, plugin: EnginePlugin, worker: Any, update: Update, incoming: Incoming, digests: Sequence[str] | None
    ) -> None:
        self._plugin = plugin
        self._worker = worker
        self._update = update
        self._incoming = incoming
        self._arrival = None if digests is None else ArrivalDigest(digests)
        self.received_bytes = 0
        self.retained_bytes = 0
        self.load_s = 0.0
        self.digest_s = 0.0
        self.ignored: list[str] = []

    @property
    def digested_bytes(self) -> int:
        """Bytes compared with the manifest so far."""
        return 0 if self._arrival is None else self._arrival.digested_bytes

    def consume(self, step: Step, reader: RingReader) -> None:
        """Digest and load the bucket of a step.

        Raises:
            VerificationError: a digest differs.
            CoverageError: the plugin did not account for every tensor of the bucket.
        """
        pieces = self._incoming.of(step)
        raw = [reader.view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes) for piece, _ in pieces]
        if self._arrival is not None:
            start = time.perf_counter()
            for (piece, meta), data in zip(pieces, raw, strict=True):
                self._arrival.add(piece.tensor, meta, data)
            self.digest_s += time.perf_counter() - start
        bucket = LoadBucket(index=step.index, tensors=tuple(map(_load_tensor, pieces, raw)))
        start = time.perf_counter()
        report = self._plugin.hook.ckpt_load(worker=self._worker, update=self._update, bucket=bucket)
        self.load_s += time.perf_counter() - start
        self._account(bucket, report)
        self.received_bytes += sum(piece.size_bytes for piece, _ in pieces)

    def _account(self, bucket: LoadBucket, report: LoadReport) -> None:
        if not isinstance(report, LoadReport):
            raise CoverageError(f"ckpt_load must return a LoadReport, got {report!r}; mend the plugin")
        sent = {item.name for item in bucket.tensors}
        accounted = {*report.loaded, *report.ignored}
        if sent != accounted:
            raise CoverageError(
                f"bucket {bucket.index}: the engine did not account for {sorted(sent - accounted)[:8]} and reported "
                f"{sorted(accounted - sent)[:8]} which it was not given; every name must be in loaded or ignored"
            )
        self.ignored.extend(report.ignored)
        self.retained_bytes = max(self.retained_bytes, report.retained_bytes)


def _load_tensor(arrived: tuple[Piece, TensorMeta], data: torch.Tensor) -> LoadTensor:
    piece, meta = arrived
    shape = meta.shape if piece.box is None else piece.box.shape
    return LoadTensor(name=meta.name, tensor=data.view(_torch_dtype(meta.dtype)).view(shape), box=piece.box)


@functools.cache
def _torch_dtype(dtype: DType) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found
