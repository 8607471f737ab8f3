"""Engines that join over limited links: what comes out of three owners and of one, against what the links allow.

    python benchmarks/p2p_join.py --json results.json

Owners and joiners are network namespaces of this machine (root and iproute2 needed); owners run `ckpt export`, joiners the
reference engine with two ranks and `ckpt join`, all as processes of their own. Owners' links are the narrow ones. NIXL is kept
to TCP (UCX_TLS): between namespaces of one machine it would find shared memory.

The bound is that of `p2p.assignment` for these links at their nominal rate, headers not counted. What all joins get in a second
is taken from the counters of the owners' links while nine tenths of the bytes cross them, times the share of these bytes that was
needed: headers and leaves that were read twice are no gain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ckpt_conformance.link_watch import LinkWatch
from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.namespaces import NetHost, NetHosts, refusal
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core.config import child_environment
from ckpt_core.p2p.assignment import assign_reads
from ckpt_core.p2p.fleet import Fleet, NicLane, Owner, Receiver
from ckpt_core.transport.p2p.base import Library

OWNER_MBIT_S = 300
JOINER_MBIT_S = 2000
MODEL = {"hidden": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "intermediate": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way: `all_mb_s` has one place per repeat, `mb_s` is its median. `read_share`: bytes read by those needed."""

    library: str
    owners: int
    joiners: int
    all_mb_s: list[float]
    mb_s: float
    bound_mb_s: float
    share_of_bound: float
    read_share: float


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=7, help="34 MB each")
    parser.add_argument("--library", type=Library, action="append", help="default: both")
    options = parser.parse_args()
    if why := refusal():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny(Path(scratch) / "m", seed=1, layers=options.layers, **MODEL)
        size_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        rows = [
            measure(library, owners, joiners, model, size_bytes, options.repeats, Path(scratch))
            for library in options.library or list(Library)
            for owners, joiners in ((1, 1), (3, 1), (3, 2))
        ]
    Console(width=140).print(table(rows, size_bytes))
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"date": time.strftime("%Y-%m-%d"), "checkpoint_bytes": size_bytes}
        about |= {"owner_mbit_s": OWNER_MBIT_S, "joiner_mbit_s": JOINER_MBIT_S}
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def measure(  # noqa: PLR0917
    library: Library, owners: int, joiners: int, model: Path, size_bytes: int, repeats: int, scratch: Path
) -> Row:
    """So many joins of fresh dummy weights, after one that warms up."""
    rates = [OWNER_MBIT_S] * owners + [JOINER_MBIT_S] * joiners
    with ExitStack() as stack:
        hosts = stack.enter_context(NetHosts(owners + joiners, mbit_s=rates)).hosts
        offers = [export(stack, host, model, library, scratch / f"{host.name}.json") for host in hosts[:owners]]
        here = [
            (host, stack.enter_context(ReferenceServer(model, tp=2, load_format="dummy", prefix=host.prefix)).url)
            for host in hosts[owners:]
        ]
        runs = [timed(hosts[:owners], here, offers, scratch) for _ in range(repeats + 1)][1:]
    reports, wires = [run[0] for run in runs], [run[1] for run in runs]
    read_bytes = [sum(agent["network_in_bytes"] for agent in report["agents"]) for report in reports[-1]]
    rates = [joiners * size_bytes / watch.total_bytes * watch.bytes_per_s / 1e6 for watch in wires]
    bound_mb_s = joiners * size_bytes / bound(owners, joiners, size_bytes) / 1e6
    return Row(
        library=library.value,
        owners=owners,
        joiners=joiners,
        all_mb_s=rates,
        mb_s=statistics.median(rates),
        bound_mb_s=bound_mb_s,
        share_of_bound=statistics.median(rates) / bound_mb_s,
        read_share=max(read_bytes) / size_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What left the owners' hosts, with headers."""

    total_bytes: int
    bytes_per_s: float


def timed(
    owners: Sequence[NetHost], here: Sequence[tuple[NetHost, str]], offers: Sequence[Path], scratch: Path
) -> tuple[list[dict[str, Any]], Wire]:
    """All join at once; their reports, and what the links say."""
    with LinkWatch(owners) as watch:
        reports = join(here, offers, scratch)
    return reports, Wire(total_bytes=sum(watch.came_out()), bytes_per_s=watch.bytes_per_s())


def export(stack: ExitStack, host: NetHost, model: Path, library: Library, out: Path) -> Path:
    """An owner that serves until the end."""
    command = [*host.prefix, sys.executable, "-m", "ckpt_core", "export", str(model), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--host", host.address, "--library", library.value],
        env={**child_environment(), "UCX_TLS": "tcp"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    while "is offered over" not in (line := process.stdout.readline()):
        assert line, "the owner ended"
    return out


def join(here: Sequence[tuple[NetHost, str]], offers: Sequence[Path], scratch: Path) -> list[dict[str, Any]]:
    """All at once; the report of each."""
    runs = []
    for host, url in here:
        report = scratch / f"{host.name}-report.json"
        command = [*host.prefix, sys.executable, "-m", "ckpt_core", "join", "--engine", "reference", "--endpoint", url]
        command += ["--host", host.address, "--json", str(report)]
        command += [word for offer in offers for word in ("--from", str(offer))]
        environment = {**child_environment(), "UCX_TLS": "tcp", "CKPT_STATE_DIR": str(scratch / host.name)}
        (scratch / host.name).mkdir(exist_ok=True)
        runs.append((report, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)))
    for _, process in runs:
        assert process.wait(300) == 0
    return [json.loads(report.read_bytes()) for report, _ in runs]


def bound(owners: int, joiners: int, size_bytes: int) -> float:
    """Seconds that the links need."""
    piece = np.array([0])
    lanes = {mbit: (NicLane(name="eth0", bytes_per_s=mbit * 1e6 / 8),) for mbit in (OWNER_MBIT_S, JOINER_MBIT_S)}
    fleet = Fleet(
        owners=tuple(Owner(name=f"owner {n}", nics=lanes[OWNER_MBIT_S], holds=piece) for n in range(owners)),
        receivers=tuple(Receiver(name=f"joiner {n}", nics=lanes[JOINER_MBIT_S], wants=piece) for n in range(joiners)),
        sizes_bytes=np.array([size_bytes]),
    )
    return assign_reads(fleet).bound.seconds


def table(rows: Sequence[Row], size_bytes: int) -> Table:
    """For people."""
    made = Table(
        title=f"{size_bytes / 1e6:.0f} MB, owners' links {OWNER_MBIT_S} Mbit/s, joiners' {JOINER_MBIT_S} Mbit/s"
    )
    for name in (
        "library",
        "owners",
        "joiners",
        "MB/s in all",
        "bound MB/s",
        "share of bound",
        "read/needed",
    ):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(
            row.library,
            str(row.owners),
            str(row.joiners),
            f"{row.mb_s:.1f}",
            f"{row.bound_mb_s:.1f}",
            f"{row.share_of_bound:.1%}",
            f"{row.read_share:.3f}",
        )
    return made


if __name__ == "__main__":
    main()
