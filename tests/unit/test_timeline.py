"""The picture of a trace: what is on the page, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ckpt_core.errors import ConfigError
from ckpt_core.timeline import _COLOURS, draw, read_chrome_trace
from ckpt_core.trace import Lane, Span, SpanStage, Track, TrackKind, write_chrome_trace

NASTY = "rank <script>alert('0')</script> & \"co\""


def tracks(name: str = NASTY) -> list[Track]:
    copies = tuple(Span(SpanStage.COPY, bucket, 70 + bucket, 70.5 + bucket, 10**9) for bucket in range(4))
    waits = (Span(SpanStage.WAIT_BYTES, 2, 70.0, 70.25),)
    return [
        Track(name="agent 0", kind=TrackKind.AGENT, lane=Lane.DEVICE, pid=7, boot_id="one", spans=copies),
        Track(name=name, kind=TrackKind.RANK, lane=Lane.HOST, pid=8, boot_id="one", spans=waits, dropped=3),
    ]


class Page(HTMLParser):
    """Elements with their attributes, and text outside of scripts and styles."""

    VOID = ("meta", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "update.json"
    write_chrome_trace(tracks(), path, {SpanStage.COPY: 4.0})
    return path


def drawn(trace_file: Path) -> str:
    out = trace_file.with_suffix(".html")
    draw(trace_file, out)
    return out.read_text(encoding="utf-8")


def test_a_file_is_read_back_as_the_tracks_it_was_written_from(trace_file: Path) -> None:
    found, limits = read_chrome_trace(trace_file)
    assert limits == {SpanStage.COPY: 4.0}
    assert [(one.name, one.kind, one.lane, one.pid, one.dropped) for one in found] == [
        ("agent 0", TrackKind.AGENT, Lane.DEVICE, 7, 0),
        (NASTY, TrackKind.RANK, Lane.HOST, 8, 3),
    ]
    (first, *_), (wait,) = found[0].spans, found[1].spans
    assert first == Span(SpanStage.COPY, 0, 0.0, pytest.approx(0.5), 10**9)
    assert wait == Span(SpanStage.WAIT_BYTES, 2, 0.0, pytest.approx(0.25), 0)


def test_every_span_is_drawn_in_the_row_of_its_track(trace_file: Path) -> None:
    page = Page(drawn(trace_file))
    bars = page.all("rect")
    assert [bar["class"] for bar in bars] == ["copy"] * 4 + ["wait_bytes"]
    assert [float(bar["x"] or "") for bar in bars[:4]] == pytest.approx([0, 1e6, 2e6, 3e6])
    assert {bar["y"] for bar in bars[:4]} != {bars[4]["y"]}
    (view,) = page.all("svg")
    assert float((view["viewbox"] or "").split()[2]) == pytest.approx(3.5e6)


def test_stages_waits_and_what_was_dropped_are_told(trace_file: Path) -> None:
    text = Page(drawn(trace_file)).text
    rows = text.split()
    assert "2000.00\n4.000\n2.0\n4.0\n50.0" in text  # busy ms, GB, GB/s, limit, percent of copy
    assert "250.00" in rows
    assert "3 spans were not recorded" in text


def test_names_are_text_and_the_page_asks_nobody_for_anything(trace_file: Path) -> None:
    raw = drawn(trace_file)
    page = Page(raw)
    assert NASTY in page.text
    assert len(page.all("script")) == 1
    asked = [value for _, attributes in page.elements for name in ("src", "href") if (value := attributes.get(name))]
    assert asked == []
    assert "http://" not in raw
    assert "https://" not in raw
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_an_update_without_spans_is_an_empty_picture(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    write_chrome_trace([], path)
    page = Page(drawn(path))
    assert page.all("rect") == []
    assert "nobody waited" in page.text


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert set(_COLOURS) == set(SpanStage)
    assert len(set(_COLOURS.values())) == len(SpanStage)


# -- what is refused -------------------------------------------------------------------------------------------------------
def span_of(document: Any) -> Any:
    return next(event for event in document["traceEvents"] if event["ph"] == "X")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["otherData"].update(producer="another profiler"),
        lambda d: d.pop("otherData"),
        lambda d: d.pop("traceEvents"),
        lambda d: d.update(traceEvents={"a": 1}),
        lambda d: d["otherData"].update(limits_gb_s={"nonsense": 3}),
        lambda d: span_of(d).update(name="<script>"),
        lambda d: span_of(d).update(ts=-1),
        lambda d: span_of(d).update(dur=-1),
        lambda d: span_of(d).update(ts=1e300),
        lambda d: span_of(d).update(pid="7"),
        lambda d: span_of(d).update(tid=77),
        lambda d: span_of(d).update(args={}),
        lambda d: span_of(d).update(args={"bucket": "1", "bytes": 1}),
        lambda d: span_of(d).update(args={"bucket": 1, "bytes": -1}),
        lambda d: span_of(d).update(args={"bucket": 1, "bytes": 10**400}),
        lambda d: d["traceEvents"][0].update(args={"name": 3}),
        lambda d: d["traceEvents"].pop(0),
    ],
)
def test_a_spoilt_trace_is_a_config_error(trace_file: Path, spoil: Callable[[Any], Any]) -> None:
    document = json.loads(trace_file.read_text())
    spoil(document)
    trace_file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"update\.json"):
        draw(trace_file, trace_file.with_suffix(".html"))
    assert not trace_file.with_suffix(".html").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"traceEvents": [], "otherData": {"producer": "\\ud800"}}',
        b"<html>",
    ],
    ids=["empty", "null", "list", "binary", "deep", "surrogate", "html"],
)
def test_what_is_no_trace_at_all_is_a_config_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"odd\.json"):
        draw(path, tmp_path / "out.html")


def test_too_many_events_are_refused(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_core.timeline._MOST_EVENTS", 3)
    with pytest.raises(ConfigError, match="at most 3"):
        draw(trace_file, trace_file.with_suffix(".html"))


def test_too_large_a_file_is_refused_before_it_is_read(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_core.timeline._MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="at most 10"):
        draw(trace_file, trace_file.with_suffix(".html"))


def test_missing_files_and_folders_are_config_errors(trace_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        draw(tmp_path / "missing.json", tmp_path / "out.html")
    with pytest.raises(ConfigError, match="cannot write"):
        draw(trace_file, tmp_path / "missing" / "out.html")
