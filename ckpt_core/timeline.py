"""A trace as a picture: one HTML page without any other file or network, drawn from what `write_chrome_trace` wrote.

Tracks run from left to right, wheel and drag zoom and move, a pointer on a span tells what it is. Below: seconds, bytes and
rates by stage against the machine's limits, and who waited for what.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckpt_core.errors import ConfigError
from ckpt_core.trace import PRODUCER, Lane, Span, SpanStage, Summary, Track, TrackKind, aligned, summarise

_MOST_BYTES = 512 << 20
_MOST_EVENTS = 400_000  # some 100 bytes each on the page
_LONGEST_US = 1e12  # eleven days
_MOST_SPAN_BYTES = 1 << 60
_ROW_PX = 30
_BAR_PX = 20
_NAMES_SHOWN = 80

# Work in colours that colour-blind people tell apart (after Okabe and Ito), waits in pale reds and greys.
_COLOURS = {
    SpanStage.WAIT_ROOM: "#f4b6b6",
    SpanStage.FILL: "#8fcdf0",
    SpanStage.COPY: "#0072b2",
    SpanStage.WAIT_READ: "#e3d3d3",
    SpanStage.BEGIN: "#8d8d8d",
    SpanStage.WAIT_BYTES: "#f7d0c4",
    SpanStage.DIGEST: "#cc79a7",
    SpanStage.LOAD: "#e69f00",
    SpanStage.PULL: "#009e73",
    SpanStage.WAIT_DRAIN: "#dedede",
    SpanStage.FINISH: "#d55e00",
    SpanStage.FINGERPRINT: "#8a5fb0",
    SpanStage.PREPARE: "#b8b8b8",
    SpanStage.PAUSE: "#7a3b3b",
    SpanStage.ATTACH: "#5b7fa6",
    SpanStage.LAYOUT: "#a9b665",
    SpanStage.PLAN: "#d3c04a",
    SpanStage.TRANSFER: "#3d4f66",
    SpanStage.COMMIT: "#2f7d4f",
    SpanStage.DETACH: "#9c8f80",
    SpanStage.FLUSH: "#66a3a3",
    SpanStage.RESUME: "#6b8e23",
}


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    """What this project writes of the Trace Event Format; other fields are not looked at. Times in microseconds."""

    ph: str
    name: str
    pid: int
    tid: int
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, Any] = {}


class _OtherData(msgspec.Struct, frozen=True, kw_only=True):
    producer: str = ""
    limits_gb_s: dict[SpanStage, float] = {}


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    traceEvents: tuple[_Event, ...]  # noqa: N815 the format's own name
    otherData: _OtherData = _OtherData()  # noqa: N815


class _ProcessArgs(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: TrackKind
    os_pid: int
    boot: str


class _ThreadArgs(msgspec.Struct, frozen=True, kw_only=True):
    name: Lane
    dropped: int


class _SpanArgs(msgspec.Struct, frozen=True, kw_only=True):
    bucket: int
    bytes: int


def draw(trace_file: Path, out_html: Path) -> None:
    """Write the picture of a trace file.

    Raises:
        ConfigError: the trace cannot be read, is not one of ours, or the page cannot be written.
    """
    tracks, limits = read_chrome_trace(trace_file)
    page = _page(tracks, summarise(tracks, limits), trace_file.name)
    try:
        out_html.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out_html}: {error}; name a file in a directory that exists") from error


def read_chrome_trace(path: Path) -> tuple[list[Track], dict[SpanStage, float]]:
    """Tracks, and limits by stage, of a file that `write_chrome_trace` wrote. Times start at 0.

    Raises:
        ConfigError: it cannot be read, is too large, or is not one of ours.
    """
    document = _document(path)
    if document.otherData.producer != PRODUCER:
        raise ConfigError(
            f"{path} is a trace of another program; `ckpt update --trace FILE` writes those that can be drawn, open others in "
            "ui.perfetto.dev"
        )
    if len(document.traceEvents) > _MOST_EVENTS:
        raise ConfigError(
            f"{path} has {len(document.traceEvents)} events, at most {_MOST_EVENTS} can be drawn; open it in ui.perfetto.dev"
        )
    try:
        return aligned(_tracks(document.traceEvents)), document.otherData.limits_gb_s
    except (msgspec.ValidationError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {error}; write it again with `ckpt update --trace FILE`") from error


def _document(path: Path) -> _Document:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MOST_BYTES:
            raise ConfigError(f"{path} has {size_bytes} bytes, at most {_MOST_BYTES} are read; trace a shorter update")
        return msgspec.json.decode(path.read_bytes(), type=_Document)
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a trace ({error}); `ckpt update --trace FILE` writes one") from error


def _tracks(events: Sequence[_Event]) -> list[Track]:
    processes: dict[int, _ProcessArgs] = {}
    threads: dict[tuple[int, int], _ThreadArgs] = {}
    spans: dict[tuple[int, int], list[Span]] = {}
    for event in events:
        place = event.pid, event.tid
        if event.ph == "X":
            spans.setdefault(place, []).append(_span(event))
        elif event.name == "process_name":
            processes[event.pid] = msgspec.convert(event.args, _ProcessArgs)
        elif event.name == "thread_name":
            threads[place] = msgspec.convert(event.args, _ThreadArgs)
    if unnamed := [place for place in spans if place not in threads or place[0] not in processes]:
        raise ValueError(f"no names for process and thread {unnamed[0]}")
    return [
        _track(processes[place[0]], threads[place], spans.get(place, [])) for place in threads if place[0] in processes
    ]


def _track(process: _ProcessArgs, thread: _ThreadArgs, spans: Sequence[Span]) -> Track:
    return Track(
        name=process.name,
        kind=process.kind,
        lane=thread.name,
        pid=process.os_pid,
        boot_id="",  # the file's times are aligned already; by the clocks of their hosts they would be moved again
        spans=tuple(spans),
        dropped=thread.dropped,
    )


def _span(event: _Event) -> Span:
    if not (0 <= event.ts <= _LONGEST_US and 0 <= event.dur <= _LONGEST_US):
        raise ValueError(f"a span from {event.ts} us for {event.dur} us")
    about = msgspec.convert(event.args, _SpanArgs)
    if not 0 <= about.bytes <= _MOST_SPAN_BYTES:
        raise ValueError(f"a span of {about.bytes} bytes")
    start_s = event.ts / 1e6
    return Span(SpanStage(event.name), about.bucket, start_s, start_s + event.dur / 1e6, about.bytes)


# -- the page --------------------------------------------------------------------------------------------------------------
def _page(tracks: Sequence[Track], summary: Summary, title: str) -> str:
    stages = [stage.stage for stage in summary.stages]
    return _PAGE.format(
        title=html.escape(title),
        total=f"{summary.total_s * 1e3:.1f}",
        dropped=f"<p>{summary.dropped} spans were not recorded, for want of room.</p>" if summary.dropped else "",
        colours="".join(f".{stage.value}{{fill:{_COLOURS[stage]};background:{_COLOURS[stage]}}}" for stage in stages),
        legend="".join(f'<span class="key"><i class="{stage.value}"></i>{stage.value}</span>' for stage in stages),
        names="".join(f"<div><b>{_name(track)}</b> {track.lane.value}</div>" for track in tracks),
        width=f"{max(summary.total_s * 1e6, 1):.3f}",
        height=_ROW_PX * max(len(tracks), 1),
        row=_ROW_PX,
        rects="\n".join(_rects(tracks)),
        stages="".join(_stage_rows(summary)),
        waits="".join(_wait_rows(summary)) or "<tr><td colspan=6>nobody waited</td></tr>",
    )


def _name(track: Track) -> str:
    name = track.name if len(track.name) <= _NAMES_SHOWN else track.name[: _NAMES_SHOWN - 1] + "…"
    return html.escape(name)


def _rects(tracks: Sequence[Track]) -> Iterator[str]:
    for row, track in enumerate(tracks):
        top = row * _ROW_PX + (_ROW_PX - _BAR_PX) // 2
        for span in track.spans:
            x, width = span.start_s * 1e6, (span.end_s - span.start_s) * 1e6
            yield (
                f'<rect class="{span.stage.value}" x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_BAR_PX}" '
                f'data-k="{span.bucket}" data-b="{span.size_bytes}"/>'
            )


def _stage_rows(summary: Summary) -> Iterator[str]:
    for stage in summary.stages:
        cells = (
            f"{stage.spans}",
            f"{stage.busy_s * 1e3:.2f}",
            f"{stage.size_bytes / 1e9:.3f}" if stage.size_bytes else "",
            _number(stage.gb_s),
            _number(stage.limit_gb_s),
            _number(stage.percent),
        )
        yield f'<tr><td><i class="{stage.stage.value}"></i>{stage.stage.value}</td>{_cells(cells)}</tr>'


def _wait_rows(summary: Summary) -> Iterator[str]:
    for wait in summary.waits:
        bucket = str(wait.longest_bucket) if wait.longest_bucket >= 0 else ""
        cells = (f"{wait.waits}", f"{wait.total_s * 1e3:.2f}", f"{wait.longest_s * 1e3:.2f}", bucket)
        yield (
            f"<tr><td>{html.escape(wait.track)}</td><td class=t><i class={wait.stage.value}></i>{wait.stage.value}</td>"
            f"{_cells(cells)}</tr>"
        )


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def _number(value: float | None) -> str:
    return f"{value:.1f}" if value is not None and math.isfinite(value) else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}: timeline</title>
<style>
body{{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#222;background:#fff}}
h1{{font-size:19px;margin:0}} h2{{font-size:15px;margin:28px 0 6px}} p{{margin:4px 0;color:#555}}
.legend{{margin:12px 0}} .key{{margin-right:16px;white-space:nowrap}}
i{{display:inline-block;width:12px;height:12px;margin-right:6px;vertical-align:-1px}}
.chart{{display:grid;grid-template-columns:max-content minmax(0,1fr);border:1px solid #ddd}}
.names{{padding:22px 10px 0;border-right:1px solid #ddd}}
.names div{{height:{row}px;line-height:{row}px;white-space:nowrap;color:#666}} .names b{{color:#222;font-weight:600}}
.plot{{position:relative;overflow:hidden;cursor:grab;touch-action:none}}
#axis{{height:22px;position:relative}}
#axis span{{position:absolute;top:3px;padding-left:4px;font-size:11px;color:#555;white-space:nowrap}}
#grid span{{position:absolute;top:0;bottom:0;border-left:1px solid #e6e6e6;pointer-events:none}}
svg{{display:block;width:100%;height:{height}px;position:relative}}
rect:hover{{stroke:#000;stroke-width:1.5px;vector-effect:non-scaling-stroke}}
{colours}
table{{border-collapse:collapse}} th,td{{padding:3px 12px;border-bottom:1px solid #e6e6e6;text-align:right;
font-variant-numeric:tabular-nums}} th{{color:#555;font-weight:500}} th:first-child,td:first-child,.t{{text-align:left}}
.tables{{display:flex;flex-wrap:wrap;gap:0 48px;align-items:flex-start}}
#tip{{position:fixed;display:none;background:#222;color:#fff;padding:4px 8px;font-size:12px;pointer-events:none;
border-radius:3px;white-space:pre;z-index:1}}
</style></head><body>
<h1>{title}</h1>
<p>{total} ms. Wheel: zoom. Drag: move. Double click: all.</p>{dropped}
<div class="legend">{legend}</div>
<div class="chart"><div class="names">{names}</div><div class="plot" id="plot"><div id="grid"></div><div id="axis"></div>
<svg id="spans" viewBox="0 0 {width} {height}" preserveAspectRatio="none">
{rects}
</svg></div></div>
<div class="tables"><div><h2>Stages</h2>
<table><tr><th>stage</th><th>spans</th><th>busy ms</th><th>GB</th><th>GB/s</th><th>limit</th><th>%</th></tr>{stages}</table>
<p>Busy: at least one track was in it. GB/s: all tracks together, while busy.</p></div>
<div><h2>Waits, the longest first</h2>
<table><tr><th>track</th><th class=t>for</th><th>times</th><th>total ms</th><th>longest ms</th><th>at bucket</th></tr>
{waits}</table></div></div><div id="tip"></div>
<script>
"use strict";
const svg = document.getElementById("spans"), plot = document.getElementById("plot"), tip = document.getElementById("tip");
const axis = document.getElementById("axis"), grid = document.getElementById("grid");
const total = {width}, height = {height};
let from = 0, width = total, held = null;
const time = us => us < 1e3 ? us.toFixed(1) + " us" : us < 1e6 ? (us / 1e3).toFixed(3) + " ms" : (us / 1e6).toFixed(4) + " s";
function show() {{
  width = Math.min(Math.max(width, 1), total);
  from = Math.min(Math.max(from, 0), total - width);
  svg.setAttribute("viewBox", [from, 0, width, height].join(" "));
  const rough = width / 8, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  axis.replaceChildren(); grid.replaceChildren();
  for (let at = Math.ceil(from / step) * step; at <= from + width; at += step) {{
    const left = 100 * (at - from) / width + "%", line = document.createElement("span"), label = document.createElement("span");
    line.style.left = label.style.left = left;
    label.textContent = step >= 1e3 ? +(at / 1e3).toFixed(3) + " ms" : +at.toFixed(2) + " us";
    grid.append(line);
    if (at < from + width * 0.95) axis.append(label);
  }}
}}
const share = event => {{ const box = svg.getBoundingClientRect(); return (event.clientX - box.left) / box.width; }};
plot.addEventListener("wheel", event => {{
  event.preventDefault();
  const at = from + share(event) * width;
  width = Math.min(width * 1.002 ** event.deltaY, total);
  from = at - share(event) * width;
  show();
}}, {{passive: false}});
plot.addEventListener("pointerdown", event => {{ held = from + share(event) * width; plot.setPointerCapture(event.pointerId); }});
plot.addEventListener("lostpointercapture", () => {{ held = null; }});
plot.addEventListener("dblclick", () => {{ from = 0; width = total; show(); }});
plot.addEventListener("pointermove", event => {{
  if (held !== null) {{ from = held - share(event) * width; show(); }}
  const span = document.elementFromPoint(event.clientX, event.clientY);
  tip.style.display = span instanceof SVGRectElement ? "block" : "none";
  if (!(span instanceof SVGRectElement)) return;
  const us = span.width.baseVal.value, bytes = +span.dataset.b;
  tip.textContent = span.getAttribute("class") + (+span.dataset.k < 0 ? "" : ", bucket " + span.dataset.k) +
    "\\nfrom " + time(span.x.baseVal.value) + ", for " + time(us) +
    (bytes ? "\\n" + (bytes / 1e6).toFixed(3) + " MB" + (us ? ", " + (bytes / us / 1e3).toFixed(2) + " GB/s" : "") : "");
  const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
  tip.style.left = left + "px";
  tip.style.top = event.clientY + 14 + "px";
}});
plot.addEventListener("pointerleave", () => {{ tip.style.display = "none"; }});
show();
</script></body></html>
"""
