"""Four hosts with two ranks each, on links of 1 Gbit/s: a routed update of the reference engine against broadcasts of everything.

    python benchmarks/several_hosts.py --json results.json

The hosts are network namespaces of this machine (root and iproute2 needed). Every host reads a quarter of the checkpoint. Ways:

* routed: each byte that a host's ranks need enters it once, along chains of hosts.
* whole: the same chains, but every host gets every tensor whole (`--no-replay`: layouts are not recorded).
* broadcast: every rank gets every byte over a collective (gloo), as checkpoint-engine does; no engine takes part.

Predictions are by what a link carries, measured first: all hosts send to the next one over TCP.
Bytes are those of the links' counters, headers and all. Seconds: of the slowest agent, first byte to last one read; `pause` is
that of the engines.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ckpt_conformance.cluster import RANKS_PER_HOST, EngineCluster
from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.namespaces import NetHosts, refusal
from ckpt_core import Target, UpdateConfig, Updater
from ckpt_core.config import Reading
from ckpt_core.metrics import UpdateReport

HOSTS = 4
MBIT_S = 1000
MODEL = {"hidden": 768, "heads": 12, "kv_heads": 12, "head_dim": 64, "intermediate": 3072}
_PORT = 29400
_BUCKET_BYTES = 4 << 20
_LINK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way at one degree. Lists have one place per repeat; bytes are of the busiest host, into it."""

    tp: int
    way: str
    seconds: list[float]
    pause_s: list[float]
    lacked_bytes: int
    wire_bytes: int
    predicted_s: float | None
    bound_s: float | None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16, help="19 MB each")
    parser.add_argument("--tp", type=int, action="append", help="degree; repeatable; default 2 and 4")
    options = parser.parse_args()
    if why := refusal():
        sys.exit(why)
    with tempfile.TemporaryDirectory() as scratch:
        models = [
            make_tiny(Path(scratch) / name, seed=seed, layers=options.layers, **MODEL) for seed, name in enumerate("ab")
        ]
        nic_gb_s = link_gb_s()
        degrees = options.tp or [2, 4]
        rows = [row for tp in degrees for row in of_engines(tp, models, options.repeats, Path(scratch), nic_gb_s)]
        size_bytes = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    rows += [broadcast(size_bytes, max(2, options.repeats // 2))]
    Console(width=140).print(table(rows, size_bytes))
    if options.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"),
        }
        result = {
            **about,
            "checkpoint_bytes": size_bytes,
            "mbit_s": MBIT_S,
            "link_gb_s": nic_gb_s,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def link_gb_s() -> float:
    """What each link carries over TCP while all hosts send and receive."""
    script = Path(__file__).with_name("link_rank.py")
    with NetHosts(HOSTS, mbit_s=MBIT_S) as net:
        ends = []
        for number, host in enumerate(net.hosts):
            following = net.hosts[(number + 1) % HOSTS]
            command = [*host.prefix, sys.executable, str(script), host.address, following.address, str(_LINK_BYTES)]
            ends.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for end in ends:  # all are connected
            assert end.stdout is not None
            assert end.stdout.readline() == "ready\n"
        for end in ends:
            assert end.stdin is not None
            end.stdin.write("go\n")
            end.stdin.flush()
        return min(_LINK_BYTES / float(end.communicate(timeout=60)[0]) / 1e9 for end in ends)


def of_engines(tp: int, models: list[Path], repeats: int, scratch: Path, nic_gb_s: float) -> list[Row]:
    """Routed and whole updates of engines of that degree."""
    with EngineCluster(scratch / f"keys-{tp}", hosts=HOSTS, mbit_s=MBIT_S, nic_gb_s=nic_gb_s) as cluster:
        targets = [Target(engine="reference", url=server.url) for server in cluster.engines(models[0], tp=tp)]
        rows = []
        for way, replay in (("routed", True), ("whole", False)):
            config = UpdateConfig(replay=replay, fingerprint=False)
            with Updater(targets, config=config, cluster=cluster.membership(Reading.STRIPED)) as updater:
                for model in (models[1], models[0]):  # loaders are recorded and proved, plans made
                    updater.update(model)
                rows.append(
                    _row(tp, way, cluster.net, lambda turn, to=updater: to.update(models[(turn + 1) % 2]), repeats)
                )
    return rows


def _row(tp: int, way: str, net: NetHosts, update: Callable[[int], UpdateReport], repeats: int) -> Row:
    reports, wires = [], []
    for turn in range(repeats):
        before = [host.bytes_in() for host in net.hosts]
        reports.append(update(turn))
        wires.append(max(host.bytes_in() - earlier for host, earlier in zip(net.hosts, before, strict=True)))
    last = reports[-1]
    assert last.predicted is not None
    return Row(
        tp=tp,
        way=way,
        seconds=[max(agent.total_s for agent in report.agents) for report in reports],
        pause_s=[report.pause_s for report in reports],
        lacked_bytes=max(host.lacked_bytes for host in last.hosts),
        wire_bytes=int(statistics.median(wires)),
        predicted_s=last.predicted.seconds,
        bound_s=last.predicted.lower_bound_s,
    )


def broadcast(size_bytes: int, repeats: int) -> Row:
    """Every byte to every rank over gloo."""
    script = Path(__file__).with_name("broadcast_rank.py")
    with NetHosts(HOSTS, mbit_s=MBIT_S) as net:
        before = [host.bytes_in() for host in net.hosts]
        ranks = []
        for rank in range(HOSTS * RANKS_PER_HOST):
            host = net.hosts[rank // RANKS_PER_HOST]
            options = {"rank": rank, "size": HOSTS * RANKS_PER_HOST, "address": host.address, "rounds": repeats}
            options |= {
                "master": net.hosts[0].address,
                "port": _PORT,
                "bytes": size_bytes,
                "bucket_bytes": _BUCKET_BYTES,
            }
            command = [*host.prefix, sys.executable, str(script), json.dumps(options)]
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        seconds = [json.loads(rank.communicate(timeout=600)[0]) for rank in ranks]
        came_in = max(host.bytes_in() - earlier for host, earlier in zip(net.hosts, before, strict=True))
    return Row(
        tp=0,
        way="broadcast",
        seconds=[max(turn) for turn in zip(*seconds, strict=True)],
        pause_s=[],
        lacked_bytes=size_bytes * RANKS_PER_HOST,
        wire_bytes=came_in // repeats,
        predicted_s=None,
        bound_s=None,
    )


def table(rows: list[Row], size_bytes: int) -> Table:
    """All rows; ratios against the routed update of the same degree."""
    made = Table(title=f"{size_bytes / 1e6:.0f} MB, {HOSTS} hosts x {RANKS_PER_HOST} ranks, {MBIT_S} Mbit/s; medians")
    columns = (
        "TP",
        "way",
        "needed MB/host",
        "wire MB/host",
        "wire/needed",
        "seconds",
        "predicted",
        "actual/pred.",
        "pause",
        "times",
    )
    for name in columns:
        made.add_column(name, justify="left" if name == "way" else "right")
    routed = {row.tp: statistics.median(row.seconds) for row in rows if row.way == "routed"}
    for row in rows:
        took = statistics.median(row.seconds)
        against = [
            f"{took / routed[tp]:.2f}" + ("" if row.tp else f" (TP{tp})") for tp in ([row.tp] if row.tp else routed)
        ]
        made.add_row(
            str(row.tp or "all"),
            row.way,
            f"{row.lacked_bytes / 1e6:.1f}",
            f"{row.wire_bytes / 1e6:.1f}",
            f"{row.wire_bytes / row.lacked_bytes:.3f}",
            f"{took:.3f}",
            "-" if row.predicted_s is None else f"{row.predicted_s:.3f}",
            "-" if row.predicted_s is None else f"{took / row.predicted_s:.2f}",
            f"{statistics.median(row.pause_s):.3f}" if row.pause_s else "-",
            ", ".join(against),
        )
    return made


if __name__ == "__main__":
    main()
