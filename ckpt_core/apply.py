"""From bytes in a ring to the engine's loader: one bucket at a time, digested, as views, and accounted for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ckpt_core.config import VerifyLevel
from ckpt_core.contract import LoadReport, Update
from ckpt_core.device import StreamTimer
from ckpt_core.errors import CoverageError
from ckpt_core.incoming import Incoming, IncomingBucket, SplitBucket, TakenPart
from ckpt_core.plan import Step
from ckpt_core.plugins import EnginePlugin
from ckpt_core.record.recorded import RecordedModel
from ckpt_core.trace import SpanRecorder, SpanStage, Unrecorded
from ckpt_core.verify import Verifier

_NOTHING = frozenset[str]()


class Applier:
    """Gives one rank its buckets.

    Args:
        recorded: what is replayed, and what is watched, of the engine's loader; None where it cannot be recorded.
        verifier: compares what arrives.
        spans, timer: record what host and device do, where asked.

    Attributes:
        received_bytes, retained_bytes: so far; retained is the peak of what the engine reported.
        replayed_bytes: read by replayed copies, of those received.
        load_s, digest_s: seconds in the plugin's load hook, and in digests.
        ignored: names the engine had no use for.
    """

    def __init__(
        self,
        plugin: EnginePlugin,
        worker: Any,
        update: Update,
        incoming: Incoming,
        verifier: Verifier,
        *,
        recorded: RecordedModel | None = None,
        spans: SpanRecorder | None = None,
        timer: StreamTimer | None = None,
    ) -> None:
        self._plugin = plugin
        self._worker = worker
        self._update = update
        self._incoming = incoming
        self._spans = spans or Unrecorded()
        self._timer = timer
        self._verifier = verifier
        self._recorded = recorded
        self.received_bytes = 0
        self.replayed_bytes = 0
        self.retained_bytes = 0
        self.load_s = 0.0
        self.digest_s = 0.0
        self.ignored: list[str] = []

    def expect(self, step: Step) -> None:
        """Make ready for the bucket of a step."""
        self._incoming.of(step)

    def consume(self, step: Step) -> None:
        """Digest and load the bucket of a step.

        Raises:
            VerificationError: a digest differs; see `Verifier.arrived`.
            CoverageError: the plugin did not account for every tensor of the bucket.
        """
        bucket = self._incoming.of(step)
        split = self._split(bucket)
        start = time.perf_counter()
        if self._verifier.level is not VerifyLevel.NONE:
            self._verifier.arrived(bucket, self._to_compare(bucket, split))
            self._spans.add(SpanStage.DIGEST, step.index, start, time.perf_counter(), bucket.size_bytes)
        digested = time.perf_counter()
        if self._timer is not None:
            self._timer.start()
        accounted = self._load(bucket, split)
        if self._timer is not None:
            self._timer.stop(SpanStage.PULL, step.index, bucket.size_bytes)
        loaded = time.perf_counter()
        self._spans.add(SpanStage.LOAD, step.index, digested, loaded, bucket.size_bytes)
        self.load_s += loaded - digested
        self.digest_s += digested - start
        self._account(bucket, accounted)
        self.received_bytes += bucket.size_bytes

    def _to_compare(self, bucket: IncomingBucket, split: SplitBucket) -> Sequence[TakenPart]:
        """Parts to digest as they arrive: all but those that are digested where they will live."""
        if self._verifier.level is not VerifyLevel.LIVE or not split.replayed or self._recorded is None:
            return bucket.parts
        later = self._recorded.at_home(bucket.load.index, split.replayed, split.parts)
        return [part for part in bucket.parts if part.number not in later]

    def _load(self, bucket: IncomingBucket, split: SplitBucket) -> set[str]:
        """Replay what can be, and give the rest to the plugin. Names that are accounted for."""
        if split.replayed:
            assert self._recorded is not None
            self.replayed_bytes += self._recorded.load(bucket.load.index, split.replayed)
        rest = split.rest
        if not rest.tensors:
            return set(split.names)
        if self._recorded is not None:
            self._recorded.arrived(rest.tensors)
            rest = self._recorded.for_loader(rest)
        report = self._plugin.hook.ckpt_load(worker=self._worker, update=self._update, bucket=rest)
        if not isinstance(report, LoadReport):
            raise CoverageError(f"ckpt_load must return a LoadReport, got {report!r}; mend the plugin")
        self.ignored.extend(report.ignored)
        self.retained_bytes = max(self.retained_bytes, report.retained_bytes)
        return {*split.names, *report.loaded, *report.ignored}

    def _split(self, bucket: IncomingBucket) -> SplitBucket:
        """What is replayed, and what is not: the same objects for the same bucket each time."""
        return bucket.split(_NOTHING if self._recorded is None else self._recorded.roots)

    def _account(self, bucket: IncomingBucket, accounted: set[str]) -> None:
        if bucket.names != accounted:
            raise CoverageError(
                f"bucket {bucket.load.index}: the engine did not account for {sorted(bucket.names - accounted)[:8]} and "
                f"reported {sorted(accounted - bucket.names)[:8]} which it was not given; every name must be in loaded or ignored"
            )
