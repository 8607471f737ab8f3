"""What a join costs an owner that serves: its token rate with and without joins, and with `--max-rate`.

    python benchmarks/p2p_serving_cost.py --json results.json

Two cores: the reference engine that serves (one rank, one thread) and the owner (`ckpt export`) share the first; the engine that
joins, its agent and the clients share the second. In each repeat, one after the other: the owner stopped by a signal, the owner
idle, joins without a limit, joins with limits, and joins with the highest limit while the owner is on the second core: what that
costs is not the owner's work. What counts are tokens made between the begin and the end of transfers; short transfers are repeated
until there is enough to count. The served model is small, so that there are many tokens; the version that is given away is larger.

NIXL is kept to TCP (UCX_TLS), as between hosts; in one machine it would find shared memory, which costs the owner nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import httpx
from cpu_sampler import CpuSampler, Window
from p2p_owner import Exporter, exporting
from rich.console import Console
from rich.table import Table

from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core.api import Updater
from ckpt_core.metrics import Stage
from ckpt_core.p2p.peers import Peers
from ckpt_core.targets import Target
from ckpt_core.transport.p2p.base import Library

MODEL = {"hidden": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "intermediate": 4096}
OWNER_CORE, JOINER_CORE = 0, 1
CLIENTS, TOKENS = 4, 16
_MOST_JOINS = 6


@dataclass(slots=True, kw_only=True)
class Row:
    """One setting; lists have one place per repeat.

    Attributes:
        gb_s: limit of a join; 0 for none. None where nobody joins.
        core: that of the owner.
        seconds: of the windows.
        read_gb_s: what joins read in them.
        owner_core, engine_core: CPU time of the owner, and of the engine that serves, by seconds of the windows.
    """

    library: str
    setting: str
    gb_s: float | None = None
    core: int = OWNER_CORE
    tokens_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    read_gb_s: list[float] = field(default_factory=list)
    owner_core: list[float] = field(default_factory=list)
    engine_core: list[float] = field(default_factory=list)

    @property
    def tokens_core_s(self) -> float:
        """Tokens by second of CPU time that engine and owner had: others on the machine change little in it (median)."""
        given = zip(self.tokens_s, self.engine_core, self.owner_core, strict=True)
        return statistics.median(tokens / (engine + owner) for tokens, engine, owner in given)


class Load:
    """Clients that ask without a pause, and what they got when. Tokens of a request count evenly over its time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._answers: list[tuple[float, float, int]] = []
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as the block runs."""
        with ThreadPoolExecutor(CLIENTS) as clients:
            asking = [clients.submit(self._ask, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self._ended.set()
        for one in asking:
            one.result()

    def tokens(self, windows: Sequence[Window]) -> float:
        """Made within these."""
        answers = list(self._answers)
        return sum(
            count * max(0.0, min(end, last) - max(begin, first)) / (end - begin)
            for first, last in windows
            for begin, end, count in answers
        )

    def _ask(self, number: int) -> None:
        body = {"prompt_token_ids": [5, 17, 42, 8 + number], "max_tokens": TOKENS, "ignore_eos": True, "stream": False}
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60.0) as client:
            while not self._ended.is_set():
                begin = time.monotonic()
                client.post("/generate", json=body).raise_for_status()
                self._answers.append((begin, time.monotonic(), TOKENS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What runs while settings are measured."""

    load: Load
    owner: Exporter
    owner_cpu: CpuSampler
    engine_cpu: CpuSampler
    joins: Callable[[float], Window]
    size_bytes: int
    least_s: float


def main() -> None:
    """Measure, print, write."""
    options = parsed()
    os.environ.setdefault("UCX_TLS", "tcp")
    os.sched_setaffinity(0, {JOINER_CORE})
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["CKPT_STATE_DIR"] = scratch
        given = make_tiny(Path(scratch) / "given", seed=1, layers=options.layers, **MODEL)
        served = make_tiny(Path(scratch) / "served", seed=2, layers=options.served_layers, **MODEL)
        rows = [
            row
            for library in options.library or list(Library)
            for row in measured(library, given, served, options, Path(scratch))
        ]
        size_bytes = checkpoint_bytes(given)
    Console(width=140).print(table(rows, size_bytes))
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"date": time.strftime("%Y-%m-%d"), "checkpoint_bytes": size_bytes, "ucx_tls": os.environ["UCX_TLS"]}
        about |= {"served_layers": options.served_layers, "clients": CLIENTS, "tokens_per_request": TOKENS}
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--least-s", type=float, default=5.0, help="window of each setting")
    parser.add_argument("--layers", type=int, default=20, help="of the version that is given away; 34 MB each")
    parser.add_argument("--served-layers", type=int, default=2)
    parser.add_argument("--max-rate", type=float, action="append", help="GB/s; default: 0.05, 0.1 and 0.2")
    parser.add_argument("--library", type=Library, action="append", help="default: both")
    return parser.parse_args()


def measured(library: Library, given: Path, served: Path, options: argparse.Namespace, scratch: Path) -> list[Row]:
    """All settings in turn, so often, after a join that warms up."""
    rows = settings(library, options.max_rate or (0.05, 0.1, 0.2))
    on_owner, on_joiner = (("taskset", "-c", str(core)) for core in (OWNER_CORE, JOINER_CORE))
    with ExitStack() as stack:
        owner = stack.enter_context(exporting(given, scratch / f"{library.value}.json", library, prefix=on_owner))
        serving = stack.enter_context(ReferenceServer(served, prefix=on_owner))
        joining = stack.enter_context(ReferenceServer(given, load_format="dummy", prefix=on_joiner))
        process = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        joins = partial(join_elsewhere, process, joining.url, owner.offer)
        joins(0.0)
        load = Load(serving.url)
        owner_cpu, engine_cpu = CpuSampler([owner.pid]), CpuSampler([serving.pid, *serving.rank_pids])
        for what in (load, owner_cpu, engine_cpu):
            stack.enter_context(what.running())
        bench = Bench(
            load=load,
            owner=owner,
            owner_cpu=owner_cpu,
            engine_cpu=engine_cpu,
            joins=joins,
            size_bytes=checkpoint_bytes(given),
            least_s=options.least_s,
        )
        for _ in range(options.repeats):
            for row in rows:
                measure(bench, row)
    return rows


def settings(library: Library, rates: Sequence[float]) -> list[Row]:
    """Rows without figures."""
    name = library.value
    quiet = [Row(library=name, setting="owner stopped"), Row(library=name, setting="no join")]
    joins = [Row(library=name, setting=f"join, {rate:g} GB/s", gb_s=rate) for rate in rates]
    apart = Row(
        library=name, setting=f"join, {max(rates):g} GB/s, owner on the second core", gb_s=max(rates), core=JOINER_CORE
    )
    return [*quiet, Row(library=name, setting="join, no limit", gb_s=0.0), *joins, apart]


def measure(bench: Bench, row: Row) -> None:
    """One more place in the lists of a row."""
    bench.owner.move(row.core)
    windows = joined(bench, row.gb_s) if row.gb_s is not None else [idled(bench, row.setting == "owner stopped")]
    time.sleep(1.0)  # requests that were under way at the end are answered
    seconds = sum(last - first for first, last in windows)
    row.seconds.append(seconds)
    row.tokens_s.append(bench.load.tokens(windows) / seconds)
    row.read_gb_s.append(0.0 if row.gb_s is None else bench.size_bytes * len(windows) / seconds / 1e9)
    row.owner_core.append(bench.owner_cpu.within(windows) / seconds)
    row.engine_core.append(bench.engine_cpu.within(windows) / seconds)


def idled(bench: Bench, stopped: bool) -> Window:
    """A window in which nobody joins."""
    if stopped:
        os.kill(bench.owner.pid, signal.SIGSTOP)
    begin = time.monotonic()
    time.sleep(bench.least_s)
    end = time.monotonic()
    if stopped:
        os.kill(bench.owner.pid, signal.SIGCONT)
    return begin, end


def joined(bench: Bench, gb_s: float) -> list[Window]:
    """As many joins as make a window of the length."""
    windows: list[Window] = []
    while len(windows) < _MOST_JOINS and sum(last - first for first, last in windows) < bench.least_s:
        windows.append(bench.joins(gb_s))
    return windows


def join_elsewhere(process: ProcessPoolExecutor, url: str, offer: Path, gb_s: float) -> Window:
    """See `join`, in another process: the clients have this one."""
    return process.submit(join, url, offer, gb_s).result()


def join(url: str, offer: Path, gb_s: float) -> Window:
    """What `ckpt join` does; when its transfer began and ended."""
    begun: dict[Stage, float] = {}

    def on_progress(stage: Stage, _done: int, _total: int) -> None:
        begun.setdefault(stage, time.monotonic())

    with Updater([Target(engine="reference", url=url)], on_progress=on_progress) as updater:
        report = updater.update(Peers(offers=[offer], max_bytes_per_s=gb_s * 1e9))
    begin = begun[Stage.TRANSFER]
    return begin, begin + report.stages[Stage.TRANSFER.value]


def checkpoint_bytes(path: Path) -> int:
    """Of all its files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def table(rows: Sequence[Row], size_bytes: int) -> Table:
    """For people."""
    made = Table(
        title=f"a version of {size_bytes / 1e9:.2f} GB, read from an owner on the core of an engine that serves"
    )
    for name in (
        "library",
        "setting",
        "tokens/s",
        "drop",
        "per CPU s",
        "drop",
        "join GB/s",
        "owner's core",
        "window s",
    ):
        made.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        quiet = next(one for one in rows if one.library == row.library and one.setting == "no join")
        rate = statistics.median(row.tokens_s)
        made.add_row(
            row.library,
            row.setting,
            f"{rate:.1f}",
            f"{1 - rate / statistics.median(quiet.tokens_s):.1%}",
            f"{row.tokens_core_s:.1f}",
            f"{1 - row.tokens_core_s / quiet.tokens_core_s:.1%}",
            f"{statistics.median(row.read_gb_s):.3f}" if row.gb_s is not None else "",
            f"{statistics.median(row.owner_core):.1%}",
            f"{statistics.median(row.seconds):.1f}",
        )
    return made


if __name__ == "__main__":
    main()
