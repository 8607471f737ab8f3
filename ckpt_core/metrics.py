"""What an update took: the report for people and machines, and the same as Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from ckpt_core.cost import Prediction
from ckpt_core.errors import Outcome
from ckpt_core.in_flight import InFlight
from ckpt_core.stats import AgentStats, RankStats
from ckpt_core.trace import NO_BUCKET, Span, SpanStage, Track


class Stage(Enum):
    """Parts of an update, in order. PREPARE is before the pause; all others are within it."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank of one engine: who, what it holds now, what it did."""

    endpoint: str
    engine: str
    rank: int
    device: str
    version: str
    digest: str
    fingerprint: str
    stats: RankStats


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """One host of a cluster.

    Attributes:
        lacked_bytes: what its ranks needed and it did not read itself, each byte once.
        network_in_bytes, network_out_bytes: what came from other hosts, and went to them.
    """

    name: str
    lacked_bytes: int
    network_in_bytes: int
    network_out_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One update.

    Attributes:
        size_bytes: of the checkpoint.
        seconds: from the call to the last resume; `pause_s` of these the engines did not serve.
        stages: seconds by stage.
        transfer_gb_s: checkpoint bytes / 1e9 / seconds from begin to the last rank verified.
        verified: level of verification that every rank passed.
        in_flight: requests that the pause met and which weights made their tokens, by engine.
        predicted: the transfer as the cost model has it, by the lane speeds of `ckpt limits`; None where those were never measured.
        hosts: what went between hosts; empty where there is one.
        tracks: what happened when, where a trace was asked for.
        digest_s, locked_bytes, lock_s: within PREPARE: digests of the checkpoint, and new page locks of the host pool.
    """

    update_id: str
    version: str
    digest: str
    outcome: Outcome
    size_bytes: int
    tensors: int
    seconds: float
    pause_s: float
    stages: dict[str, float]
    transfer_gb_s: float
    ring_bytes: int
    verified: str
    in_flight: tuple[InFlight, ...]
    digest_s: float
    locked_bytes: int
    lock_s: float
    ranks: tuple[RankReport, ...]
    agents: tuple[AgentStats, ...]
    predicted: Prediction | None = None
    hosts: tuple[HostReport, ...] = ()
    tracks: tuple[Track, ...] = ()

    @property
    def requests_in_flight(self) -> int | None:
        """Requests that the pause met, over all engines that tell."""
        told = [met.requests for met in self.in_flight if met.requests is not None]
        return sum(told) if told else None

    def to_json(self) -> bytes:
        """Stable, indented JSON, without the tracks."""
        return msgspec.json.format(msgspec.json.encode(replace(self, tracks=())), indent=2) + b"\n"

    def write_metrics(self, path: Path) -> None:
        """Write a Prometheus text file (for a node exporter's textfile collector), atomically."""
        registry = CollectorRegistry()
        labels = {"version": self.version, "outcome": self.outcome.value}
        for name, text, value in (
            ("ckpt_update_bytes", "Bytes of the checkpoint", self.size_bytes),
            ("ckpt_update_seconds", "Seconds from call to resume", self.seconds),
            ("ckpt_update_pause_seconds", "Seconds in which engines did not serve", self.pause_s),
            ("ckpt_update_transfer_gigabytes_per_second", "Transfer rate", self.transfer_gb_s),
            ("ckpt_update_finished_timestamp_seconds", "Unix time of the end", time.time()),
        ):
            Gauge(name, text, list(labels), registry=registry).labels(**labels).set(value)
        stages = Gauge("ckpt_update_stage_seconds", "Seconds by stage", [*labels, "stage"], registry=registry)
        for stage, seconds in self.stages.items():
            stages.labels(**labels, stage=stage).set(seconds)
        write_to_textfile(str(path), registry)


@dataclass(slots=True)
class Stopwatch:
    """Seconds by stage, and when each was."""

    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Time a block; the time counts also where it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[stage.value] = self.seconds.get(stage.value, 0.0) + end - start
            self.spans.append(Span(SpanStage(stage.value), NO_BUCKET, start, end))
