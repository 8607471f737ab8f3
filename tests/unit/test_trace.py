"""Spans, their way over the wire, the two clocks, the summary and the file."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from ckpt_core import trace
from ckpt_core.cuda import driver
from ckpt_core.device_spans import DeviceSpans, TimedEvent
from ckpt_core.errors import ConfigError
from ckpt_core.metrics import Stage
from ckpt_core.trace import (
    Lane,
    Span,
    SpanRecorder,
    SpanStage,
    Track,
    TrackKind,
    aligned,
    summarise,
    union_s,
    write_chrome_trace,
)


def track(*spans: Span, name: str = "agent 0", boot_id: str = "one", **more: object) -> Track:
    made = Track(name=name, kind=TrackKind.AGENT, lane=Lane.HOST, pid=7, boot_id=boot_id, spans=spans)
    return replace(made, **more)


def copy(bucket: int, start_s: float, end_s: float, size_bytes: int = 0) -> Span:
    return Span(SpanStage.COPY, bucket, start_s, end_s, size_bytes)


# -- recording ---------------------------------------------------------------------------------------------------------
def test_a_recorder_keeps_the_first_spans_counts_the_rest_and_starts_anew() -> None:
    recorder = SpanRecorder(limit=2)
    for bucket in range(5):
        recorder.add(SpanStage.FILL, bucket, bucket, bucket + 0.5, 10)
    spans, dropped = recorder.take()
    assert [span.bucket for span in spans] == [0, 1]
    assert spans[1] == Span(SpanStage.FILL, 1, 1, 1.5, 10)
    assert dropped == 3
    assert recorder.take() == ((), 0)


def test_a_timed_block_is_recorded_also_where_it_raises() -> None:
    recorder = SpanRecorder()
    before_s = time.monotonic()
    with pytest.raises(KeyError), recorder.timed(SpanStage.FINISH):
        raise KeyError
    ((stage, bucket, start_s, end_s, _),), _ = recorder.take()
    assert (stage, bucket) == (SpanStage.FINISH, trace.NO_BUCKET)
    assert before_s <= start_s <= end_s <= time.monotonic()


def test_spans_of_a_large_update_cost_microseconds_each() -> None:
    recorder = SpanRecorder()
    start = time.process_time()
    for bucket in range(20_000):
        recorder.add(SpanStage.FILL, bucket, 0.0, 1.0, 10)
    assert time.process_time() - start < 0.4  # 20 us each: far from the some 0.3 measured, yet far below a bucket


def test_tracks_travel_as_they_are_without_the_names_of_span_fields() -> None:
    sent = track(copy(3, 1.25, 2.5, 100), dropped=2)
    frame = msgspec.msgpack.encode(sent)
    assert msgspec.msgpack.decode(frame, type=Track) == sent
    assert b"start_s" not in frame


def test_a_track_with_an_unknown_stage_is_refused() -> None:
    frame = msgspec.msgpack.encode(track(copy(3, 1.25, 2.5))).replace(b"copy", b"cope")
    with pytest.raises(msgspec.ValidationError, match="cope"):
        msgspec.msgpack.decode(frame, type=Track)


def test_the_controllers_stages_are_stages_of_spans() -> None:
    assert {stage.value for stage in Stage} <= {stage.value for stage in SpanStage}


# -- device clock --------------------------------------------------------------------------------------------------------
class FakeDevice:
    """A stream whose clock starts elsewhere; events are reached when it has run that far."""

    def __init__(self) -> None:
        self.now_s = 500.0
        self.reached_s = float("inf")
        self.live = 0


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._at_s = float("nan")
        device.live += 1

    def record(self, stream: object) -> None:
        self._at_s = self._device.now_s

    def reached(self) -> bool:
        return self._at_s <= self._device.reached_s

    def since(self, earlier: FakeEvent) -> float:
        assert self.reached()
        assert earlier.reached()
        return self._at_s - earlier._at_s

    def close(self) -> None:
        self._device.live -= 1


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def host_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time 100.0, 100.1, ...: each look at the clock takes a tenth of a second."""
    ticks = itertools.count()
    monkeypatch.setattr(trace.time, "monotonic", lambda: 100 + next(ticks) / 10)


def spans_on(device: FakeDevice, **more: int) -> DeviceSpans[FakeEvent]:
    return DeviceSpans(lambda: FakeEvent(device), **more)


def record(spans: DeviceSpans[FakeEvent], device: FakeDevice, bucket: int, idle_s: float, busy_s: float) -> None:
    device.now_s += idle_s
    spans.start(None)
    device.now_s += busy_s
    spans.stop(None, SpanStage.COPY, bucket, 64)


@pytest.mark.usefixtures("host_clock")
def test_device_spans_come_out_on_the_hosts_clock(device: FakeDevice) -> None:
    spans = spans_on(device)
    spans.anchor(None)
    record(spans, device, 0, idle_s=1.0, busy_s=0.25)
    record(spans, device, 1, idle_s=0.5, busy_s=0.25)
    found, dropped = spans.take()
    anchor_s = 100.05  # half way between the looks at 100.0 and 100.1, around the anchor
    assert found == (
        Span(SpanStage.COPY, 0, pytest.approx(anchor_s + 1.0), pytest.approx(anchor_s + 1.25), 64),
        Span(SpanStage.COPY, 1, pytest.approx(anchor_s + 1.75), pytest.approx(anchor_s + 2.0), 64),
    )
    assert dropped == 0
    assert spans.uncertainty_s == pytest.approx(0.05)


def test_the_tightest_of_several_anchors_is_kept(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([10.0, 14.0, 20.0, 20.5, 30.0, 32.0])
    monkeypatch.setattr(trace.time, "monotonic", lambda: next(looks))
    spans = spans_on(device)
    spans.anchor(None)
    record(spans, device, 0, idle_s=0.0, busy_s=1.0)
    ((_, _, start_s, end_s, _),), _ = spans.take()
    assert (start_s, end_s) == (20.25, 21.25)
    assert spans.uncertainty_s == 0.25


def test_spans_that_the_device_has_not_reached_stay_for_the_next_call(device: FakeDevice) -> None:
    spans = spans_on(device)
    spans.anchor(None)
    record(spans, device, 0, idle_s=0, busy_s=1)
    device.reached_s = device.now_s
    record(spans, device, 1, idle_s=0, busy_s=1)
    assert [span.bucket for span in spans.take()[0]] == [0]
    device.reached_s = device.now_s
    assert [span.bucket for span in spans.take()[0]] == [1]


def test_events_are_used_again_and_all_are_destroyed(device: FakeDevice) -> None:
    spans = spans_on(device)
    for _ in range(3):
        spans.anchor(None)
        for bucket in range(10):
            record(spans, device, bucket, idle_s=0, busy_s=1)
        assert len(spans.take()[0]) == 10
    assert device.live <= 10 * 2 + DeviceSpans._ANCHORS + 1
    record(spans, device, 0, idle_s=0, busy_s=1)  # neither taken
    spans.start(None)  # nor ended
    spans.close()
    assert device.live == 0


def test_an_anchor_forgets_what_an_aborted_update_left(device: FakeDevice) -> None:
    spans = spans_on(device)
    spans.anchor(None)
    record(spans, device, 0, idle_s=0, busy_s=1)
    spans.start(None)
    spans.anchor(None)
    record(spans, device, 9, idle_s=0, busy_s=1)
    assert [span.bucket for span in spans.take()[0]] == [9]


@pytest.mark.usefixtures("host_clock")
def test_a_stream_that_stays_busy_costs_the_spans_not_the_update(device: FakeDevice) -> None:
    device.reached_s = 0.0
    spans = spans_on(device)
    spans.anchor(None, timeout_s=2.0)
    record(spans, device, 0, idle_s=0, busy_s=1)
    device.reached_s = device.now_s
    assert spans.take() == ((), 1)


def test_device_spans_are_bounded(device: FakeDevice) -> None:
    spans = spans_on(device, limit=2)
    spans.anchor(None)
    for bucket in range(5):
        record(spans, device, bucket, idle_s=0, busy_s=1)
    found, dropped = spans.take()
    assert [span.bucket for span in found] == [0, 1]
    assert dropped == 3


def test_the_drivers_event_is_a_timed_event() -> None:
    wanted = {name for name in vars(TimedEvent) if not name.startswith("_")}
    assert wanted <= set(dir(driver.Event))


# -- summary -------------------------------------------------------------------------------------------------------------
def test_busy_seconds_are_those_of_at_least_one_track() -> None:
    assert union_s([]) == 0
    assert union_s([copy(0, 5, 6), copy(0, 0, 2), copy(0, 1, 3), copy(0, 1.5, 1.6)]) == 4


def test_stages_have_bytes_rates_and_percent_of_their_limit() -> None:
    tracks = [track(copy(0, 10, 11, 10**9)), track(copy(1, 10, 12, 2 * 10**9), name="agent 1")]
    tracks[0] = replace(tracks[0], spans=(*tracks[0].spans, Span(SpanStage.WAIT_ROOM, 2, 11, 11.5)), dropped=4)
    summary = summarise(tracks, {SpanStage.COPY: 3.0})
    waiting, copying = summary.stages
    assert (copying.stage, copying.spans, copying.busy_s, copying.size_bytes) == (SpanStage.COPY, 2, 2, 3 * 10**9)
    assert (copying.gb_s, copying.percent) == (1.5, 50.0)
    assert (waiting.gb_s, waiting.percent, waiting.limit_gb_s) == (None, None, None)
    assert (summary.total_s, summary.dropped) == (2, 4)


def test_waits_are_told_by_track_and_cause_the_longest_first() -> None:
    waits = [
        Span(SpanStage.WAIT_ROOM, 4, 0, 1),
        Span(SpanStage.WAIT_ROOM, 5, 2, 4),
        Span(SpanStage.WAIT_READ, -1, 5, 6),
    ]
    other = track(Span(SpanStage.WAIT_BYTES, 8, 0, 30), copy(1, 0, 99), name="rank 0")
    first, second, third = summarise([track(*waits), other]).waits
    assert (first.track, first.stage, first.total_s) == ("rank 0", SpanStage.WAIT_BYTES, 30)
    assert (second.track, second.stage, second.waits, second.total_s) == ("agent 0", SpanStage.WAIT_ROOM, 2, 3)
    assert (second.longest_s, second.longest_bucket) == (2, 5)
    assert third.stage is SpanStage.WAIT_READ


def test_nothing_recorded_is_an_empty_summary() -> None:
    summary = summarise([track()])
    assert (summary.total_s, summary.stages, summary.waits, summary.dropped) == (0, (), (), 0)


def test_each_boot_has_a_zero_of_its_own() -> None:
    tracks = [
        track(copy(0, 100, 101)),
        track(copy(0, 99, 100)),
        track(copy(0, 7, 8), boot_id="two"),
        track(boot_id="three"),
    ]
    starts = [[span.start_s for span in shifted.spans] for shifted in aligned(tracks)]
    assert starts == [[1], [0], [0], []]


# -- the file --------------------------------------------------------------------------------------------------------------
def test_the_file_has_complete_events_names_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    host = track(Span(SpanStage.FILL, 3, 50.0, 50.001, 4096))
    device = replace(host, lane=Lane.DEVICE, spans=(copy(3, 50.0005, 50.002, 4096),))
    write_chrome_trace([host, device, track(copy(3, 50, 51), name="agent 1")], path, {SpanStage.COPY: 111.0})
    document = json.loads(path.read_text())
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["pid"], event["tid"]) for event in spans] == [
        ("fill", 1, 1),
        ("copy", 1, 2),
        ("copy", 2, 2 - 1),
    ]
    assert spans[1]["ts"] == pytest.approx(500)
    assert spans[1]["dur"] == pytest.approx(1500)
    assert spans[1]["args"] == {"bucket": 3, "bytes": 4096}
    names = {event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    assert names == {"agent 0", "agent 1", "host", "device"}
    assert document["otherData"] == {"producer": "ckpt-core", "limits_gb_s": {"copy": 111.0}}


def test_processes_of_two_hosts_with_one_number_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace([track(copy(0, 5, 6)), track(copy(0, 9, 10), boot_id="two")], path)
    events = json.loads(path.read_text())["traceEvents"]
    assert [event["pid"] for event in events if event["ph"] == "X"] == [1, 2]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["agent 0, clock 1", "agent 0, clock 2"]


def test_a_file_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the trace"):
        write_chrome_trace([], tmp_path / "missing" / "trace.json")
