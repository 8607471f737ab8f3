"""What happened when, per bucket: spans of host and device work, their summary, and a Chrome trace of them.

All times are `time.monotonic()` seconds (CLOCK_MONOTONIC, which `time.perf_counter()` also reads): comparable between
processes of one boot of one host, so every track carries the boot id, and tracks of other boots get a zero of their own.
Written files follow the Trace Event Format, which chrome://tracing and ui.perfetto.dev open. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ckpt_core.errors import ConfigError

PRODUCER = "ckpt-core"
MOST_SPANS = 65536  # of one recorder: 100 updates' worth of buckets, 5 MB on the wire
NO_BUCKET = -1


class SpanStage(Enum):
    """What the time of a span went to: first of agents, then of ranks, then the controller's stages of an update."""

    WAIT_ROOM = "wait_room"  # the ring is full: ranks have not read yet what the next bucket overwrites
    FILL = "fill"  # the agent's host issues the copies of a bucket, or makes them, where its ring is host memory
    COPY = "copy"  # the device copies a bucket from the host
    WAIT_READ = "wait_read"  # all is sent, the ranks read the last of it
    BEGIN = "begin"
    WAIT_BYTES = "wait_bytes"  # the next bucket of the plan is not there yet
    DIGEST = "digest"
    LOAD = "load"  # the engine's load hook, on the host
    PULL = "pull"  # the device takes a bucket out of a ring into the parameters
    WAIT_DRAIN = "wait_drain"  # all is loaded, the device finishes it
    FINISH = "finish"
    FINGERPRINT = "fingerprint"
    PREPARE = "prepare"
    PAUSE = "pause"
    ATTACH = "attach"
    LAYOUT = "layout"
    PLAN = "plan"
    TRANSFER = "transfer"
    COMMIT = "commit"
    DETACH = "detach"
    FLUSH = "flush"
    RESUME = "resume"

    @property
    def waits(self) -> bool:
        """Whether nothing is done in it."""
        return self.value.startswith("wait_")


class TrackKind(Enum):
    """Whose track it is."""

    CONTROLLER = "controller"
    AGENT = "agent"
    RANK = "rank"


class Lane(Enum):
    """What worked: the process's own thread, or the stream of its device."""

    HOST = "host"
    DEVICE = "device"


class Span(NamedTuple):
    """A stage of one bucket (NO_BUCKET where it is of none), from start to end.

    A tuple, not a dataclass: thousands are made within a transfer, and it travels as an array without its field names.
    """

    stage: SpanStage
    bucket: int
    start_s: float
    end_s: float
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """The spans of one lane of one process.

    Attributes:
        name: as in "agent 0" or "rank 1 of http://host:8000".
        boot_id: what the clock of the spans belongs to.
        dropped: spans that its recorder had no room for.
    """

    name: str
    kind: TrackKind
    lane: Lane
    pid: int
    boot_id: str
    spans: tuple[Span, ...]
    dropped: int = 0


class SpanRecorder:
    """Collects spans: some 0.2 us each. Past `limit` the first ones are kept and the rest is counted in `dropped`."""

    def __init__(self, limit: int = MOST_SPANS) -> None:
        self._limit = limit
        self._spans: list[Span] = []
        self.dropped = 0

    def add(self, stage: SpanStage, bucket: int, start_s: float, end_s: float, size_bytes: int = 0) -> None:
        """One span that has ended."""
        if len(self._spans) < self._limit:
            self._spans.append(Span(stage, bucket, start_s, end_s, size_bytes))
        else:
            self.dropped += 1

    @contextmanager
    def timed(self, stage: SpanStage, bucket: int = NO_BUCKET, size_bytes: int = 0) -> Iterator[None]:
        """A span around a block, also where it raises. For what happens a few times in an update."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, bucket, start_s, time.monotonic(), size_bytes)

    def take(self) -> tuple[tuple[Span, ...], int]:
        """The spans so far and how many were dropped; starts anew."""
        spans, dropped = tuple(self._spans), self.dropped
        self._spans, self.dropped = [], 0
        return spans, dropped


class Unrecorded(SpanRecorder):
    """Takes spans and keeps none."""

    def add(self, stage: SpanStage, bucket: int, start_s: float, end_s: float, size_bytes: int = 0) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One stage over all tracks.

    Attributes:
        busy_s: seconds in which at least one track was in it (the union of the spans).
        limit_gb_s: what the machine can do in this stage, all tracks together; None where not known.
    """

    stage: SpanStage
    spans: int
    busy_s: float
    size_bytes: int
    limit_gb_s: float | None = None

    @property
    def gb_s(self) -> float | None:
        """Bytes over busy seconds, in 1e9 bytes a second; None for stages without bytes."""
        return self.size_bytes / 1e9 / self.busy_s if self.size_bytes and self.busy_s > 0 else None

    @property
    def percent(self) -> float | None:
        """Of the limit."""
        return 100 * self.gb_s / self.limit_gb_s if self.gb_s is not None and self.limit_gb_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitSummary:
    """One cause of waiting on one track: total seconds, and the longest single wait."""

    track: str
    stage: SpanStage
    waits: int
    total_s: float
    longest_s: float
    longest_bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Where the time of all tracks went: stages in order of SpanStage, waits with the largest total first."""

    total_s: float
    stages: tuple[StageSummary, ...]
    waits: tuple[WaitSummary, ...]
    dropped: int


def summarise(tracks: Sequence[Track], limits_gb_s: Mapping[SpanStage, float] | None = None) -> Summary:
    """Seconds, bytes and rates by stage, and waits by track and cause."""
    limits = limits_gb_s or {}
    spans: dict[SpanStage, list[Span]] = {stage: [] for stage in SpanStage}
    for track in aligned(tracks):
        for span in track.spans:
            spans[span.stage].append(span)
    return Summary(
        total_s=max((span.end_s for mine in spans.values() for span in mine), default=0.0),
        stages=tuple(_stage(stage, mine, limits.get(stage)) for stage, mine in spans.items() if mine),
        waits=tuple(sorted((w for track in tracks for w in _waits(track)), key=lambda wait: -wait.total_s)),
        dropped=sum(track.dropped for track in tracks),
    )


def _stage(stage: SpanStage, spans: Sequence[Span], limit_gb_s: float | None) -> StageSummary:
    size_bytes = sum(span.size_bytes for span in spans)
    return StageSummary(
        stage=stage, spans=len(spans), busy_s=union_s(spans), size_bytes=size_bytes, limit_gb_s=limit_gb_s
    )


def _waits(track: Track) -> Iterator[WaitSummary]:
    for stage in SpanStage:
        mine = [span for span in track.spans if span.stage is stage and stage.waits]
        if mine:
            longest = max(mine, key=lambda span: span.end_s - span.start_s)
            yield WaitSummary(
                track=track.name,
                stage=stage,
                waits=len(mine),
                total_s=sum(span.end_s - span.start_s for span in mine),
                longest_s=longest.end_s - longest.start_s,
                longest_bucket=longest.bucket,
            )


def union_s(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one of the spans."""
    total_s, covered_s = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total_s += max(0.0, span.end_s - max(span.start_s, covered_s))
        covered_s = max(covered_s, span.end_s)
    return total_s


def aligned(tracks: Sequence[Track]) -> list[Track]:
    """The same tracks with times from 0: the first span of each boot. Between hosts only durations can be compared."""
    zeros: dict[str, float] = {}
    for track in tracks:
        for span in track.spans:
            zeros[track.boot_id] = min(span.start_s, zeros.get(track.boot_id, span.start_s))
    return [replace(track, spans=_shifted(track.spans, zeros.get(track.boot_id, 0.0))) for track in tracks]


def _shifted(spans: Iterable[Span], zero_s: float) -> tuple[Span, ...]:
    return tuple(span._replace(start_s=span.start_s - zero_s, end_s=span.end_s - zero_s) for span in spans)


def write_chrome_trace(
    tracks: Sequence[Track], path: Path, limits_gb_s: Mapping[SpanStage, float] | None = None
) -> None:
    """Write tracks as Trace Event JSON; limits (GB/s of all tracks together) go along for `ckpt timeline`.

    Raises:
        ConfigError: the file cannot be written.
    """
    document = {
        "displayTimeUnit": "ms",
        "otherData": {
            "producer": PRODUCER,
            "limits_gb_s": {stage.value: limit for stage, limit in (limits_gb_s or {}).items()},
        },
        "traceEvents": list(_events(aligned(tracks))),
    }
    try:
        path.write_bytes(msgspec.json.encode(document))
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error}; name a file in a directory that exists") from error


def _events(tracks: Sequence[Track]) -> Iterator[dict[str, Any]]:
    """Processes are numbered here: their own numbers repeat between hosts and namespaces."""
    boots = list(dict.fromkeys(track.boot_id for track in tracks))
    lanes = list(Lane)
    processes: dict[tuple[str, int, str], int] = {}
    for track in tracks:
        process = processes.setdefault((track.boot_id, track.pid, track.name), len(processes) + 1)
        place = {"pid": process, "tid": lanes.index(track.lane) + 1}
        about = {"kind": track.kind.value, "os_pid": track.pid, "boot": track.boot_id, "name": track.name}
        clock = f", clock {boots.index(track.boot_id) + 1}" if len(boots) > 1 else ""
        yield {"ph": "M", "name": "process_name", **place, "args": {**about, "name": f"{track.name}{clock}"}}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": track.lane.value, "dropped": track.dropped}}
        for span in track.spans:
            when = {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
            what = {"name": span.stage.value, "cat": track.kind.value}
            yield {"ph": "X", **what, **when, **place, "args": {"bucket": span.bucket, "bytes": span.size_bytes}}
