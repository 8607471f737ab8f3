"""What the benchmarks of real engines share: timed updates by one way, the peer's run beside them, and one table."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig
from ckpt_core.metrics import UpdateReport

_OF_RANKS = (
    "received_bytes",
    "replayed_bytes",
    "recorded_share",
    "wait_s",
    "load_s",
    "begin_s",
    "finish_s",
    "retained_bytes",
)


@dataclass(slots=True, kw_only=True)
class Result:
    """Updates by one way. Seconds; the first is apart."""

    way: str
    size_gb: float
    first_s: float = 0.0
    whole_s: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    first_stages: dict[str, float] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    ring_mib: float = 0.0
    wrong: int = 0
    tokens: list[list[int]] = field(default_factory=list)
    fingerprints: dict[str, list[str]] = field(default_factory=dict)

    def note(self, report: UpdateReport, whole_s: float, *, first: bool) -> None:
        """Keep what one update took."""
        if first:
            self.first_s, self.first_stages = report.pause_s, report.stages
            return
        self.whole_s.append(whole_s)
        self.pause_s.append(report.pause_s)
        self.stages = report.stages
        self.ring_mib = report.ring_bytes / MIB
        self.ranks = [{name: getattr(rank.stats, name) for name in _OF_RANKS} for rank in report.ranks]


def timed_updates(
    target: ckpt_core.Target, config: UpdateConfig, result: Result, checkpoints: Sequence[Path], count: int
) -> Iterator[None]:
    """So many updates and a first one, to the checkpoints in turn; yields after each, for what is to be looked at then."""
    with ckpt_core.Updater([target], config=config) as updater:
        for number in range(count + 1):
            start = time.perf_counter()
            report = updater.update(checkpoints[number % len(checkpoints)], version=f"{result.way}-{number}")
            result.note(report, time.perf_counter() - start, first=number == 0)
            yield


def parse_options(
    description: str | None, engine: str, *more: Callable[[argparse.ArgumentParser], object]
) -> argparse.Namespace:
    """Options that all have, and those that `more` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-32b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ring", type=int, default=128, help="MiB; grows to the largest tensor that comes whole")
    parser.add_argument("--server", default="", help=f"more arguments for {engine}")
    parser.add_argument("--peer", type=Path, help=f"the peer's benchmark script for a server of {engine}")
    parser.add_argument("--start-timeout", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True)
    for add in more:
        add(parser)
    return parser.parse_args()


def compare_ways(
    engine: str, url: str, ways: Sequence[str], update_by: Callable[[str], Result], options: argparse.Namespace
) -> None:
    """Updates by each way, the peer's after the first; what there is, is kept and printed after each."""
    results: list[Result] = []
    peer: dict[str, Any] = {}
    for number, way in enumerate(ways):
        results.append(update_by(way))
        if options.peer and number == 0:
            arguments = (options.model, str(options.layers), str(options.repeats + 1), url)
            peer = run_peer(options.peer, arguments, options.tp)
        # a run that is cut short keeps what it has
        data = {
            "versions": _versions(engine.lower(), "torch", "ckpt-core"),
            "results": [asdict(result) for result in results],
            "peer": peer,
        }
        options.out.write_text(json.dumps(data, indent=1))
        print_results(engine, results, peer, Console(width=150))


def run_peer(script: Path, arguments: Sequence[str], tp: int) -> dict[str, Any]:
    """The peer's JSON line, or why there is none."""
    command = ["torchrun", f"--nproc-per-node={tp}", str(script), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired as error:
        return {"error": f"no end within {error.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": done.stderr[-1500:]}
    return found


_CELLS: dict[str, Callable[[Result], str]] = {
    "way": lambda result: result.way,
    "GB": lambda result: f"{result.size_gb:.1f}",
    "ring MiB": lambda result: f"{result.ring_mib:.0f}",
    "pause median": lambda result: f"{statistics.median(result.pause_s):.4f}",
    "min": lambda result: f"{min(result.pause_s):.4f}",
    "max": lambda result: f"{max(result.pause_s):.4f}",
    "transfer": lambda result: f"{result.stages['transfer']:.4f}",
    "GB/s": lambda result: f"{result.size_gb / statistics.median(result.pause_s):.1f}",
    "first": lambda result: f"{result.first_s:.3f}",
    "whole call": lambda result: f"{statistics.median(result.whole_s):.3f}",
    "recorded %": lambda result: f"{100 * min(rank['recorded_share'] for rank in result.ranks):.2f}",
    "GB a rank": lambda result: f"{max(_pulled(rank) for rank in result.ranks) / 1e9:.2f}",
    "wrong": lambda result: str(result.wrong),
}


def print_results(engine: str, results: list[Result], peer: dict[str, Any], console: Console) -> None:
    """One table for all."""
    table = Table(title=f"seconds of a steady update of a real {engine}")
    for name in _CELLS:
        table.add_column(name, justify="left" if name == "way" else "right")
    for result in results:
        table.add_row(*(cell(result) for cell in _CELLS.values()))
    if "update" in peer:
        steady = peer["update"][1:]
        median = statistics.median(steady)
        row = [f"{median:.4f}", f"{min(steady):.4f}", f"{max(steady):.4f}", "", f"{peer['GB'] / median:.1f}"]
        rest = [""] * (len(_CELLS) - len(row) - 4)
        table.add_row("checkpoint-engine", f"{peer['GB']:.1f}", "", *row, f"{peer['update'][0]:.3f}", *rest)
    elif peer:
        console.print(f"peer: {peer}")
    console.print(table)


def _versions(*names: str) -> dict[str, str]:
    """Of those distributions, and today's date."""
    return {name: version(name) for name in names} | {"date": time.strftime("%Y-%m-%d")}


def _pulled(rank: dict[str, Any]) -> int:
    """Bytes that a rank read out of rings: where all is replayed, only its own slices."""
    return int(rank["replayed_bytes"] or rank["received_bytes"])
