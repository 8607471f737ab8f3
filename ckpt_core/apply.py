"""From bytes in a ring to the engine's loader: one bucket at a time, digested, as views, and accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import LoadBucket, LoadReport, LoadTensor, Update
from ckpt_core.errors import CoverageError
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Step
from ckpt_core.plugins import EnginePlugin
from ckpt_core.transport.base import RingReader
from ckpt_core.verify import ArrivalDigest

if TYPE_CHECKING:
    import torch


class Applier:
    """Gives one rank its buckets.

    Attributes:
        received_bytes, retained_bytes: so far; retained is the peak of what the engine reported.
        load_s, digest_s: seconds in the plugin's load hook, and in digests.
        ignored: names the engine had no use for.
    """

    def __init__(self, plugin: EnginePlugin, worker: Any, update: Update, manifest: Manifest, *, digest: bool) -> None:
        self._plugin = plugin
        self._worker = worker
        self._update = update
        self._manifest = manifest
        self._arrival = ArrivalDigest() if digest else None
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
        raw = [
            reader.view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes) for piece in step.bucket.pieces
        ]
        self.digest_s += _timed(lambda: self._digest(step, raw))
        bucket = LoadBucket(index=step.index, tensors=self._tensors(step, raw))
        start = time.perf_counter()
        report = self._plugin.hook.ckpt_load(worker=self._worker, update=self._update, bucket=bucket)
        self.load_s += time.perf_counter() - start
        self._account(bucket, report)
        self.received_bytes += step.bucket.size_bytes

    def _digest(self, step: Step, raw: list[torch.Tensor]) -> None:
        if self._arrival is None:
            return
        for piece, data in zip(step.bucket.pieces, raw, strict=True):
            self._arrival.add(self._manifest.tensors[piece.tensor], data)

    def _tensors(self, step: Step, raw: list[torch.Tensor]) -> tuple[LoadTensor, ...]:
        import torch

        result = []
        for piece, data in zip(step.bucket.pieces, raw, strict=True):
            meta = self._manifest.tensors[piece.tensor]
            shape = meta.shape if piece.box is None else piece.box.shape
            tensor = data.view(getattr(torch, meta.dtype.torch_name)).view(shape)
            result.append(LoadTensor(name=meta.name, tensor=tensor, box=piece.box))
        return tuple(result)

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


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
