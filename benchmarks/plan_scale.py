"""How long plans of large clusters take to make, how even their lanes are, and what simulations of them say.

    python benchmarks/plan_scale.py --out results.json [--only kimi-k2] [--no-simulation]

Three parts: models of up to 1 T parameters on up to 4096 ranks, each case in a process of its own on one core; simulations
of this project's updates of two GPUs against their measured times in benchmarks/results; and of checkpoint-engine's schedule
against the times that its README publishes.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import published_schedule
from fleet_models import DECODERS, Parallelism, class_needs, manifest_of
from rich.console import Console
from rich.table import Table
from shapes import MODELS

from ckpt_core.cost import LaneSpeeds, routed_alternatives
from ckpt_core.dtypes import DType
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import make_plan
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.routed import make_routed_plan
from ckpt_core.routing.topology import striped, uniform
from ckpt_core.simulate import FleetRates, HostRates, simulate_plan, simulate_routed

RESULTS = Path(__file__).parent / "results"
RANKS_PER_HOST = 8
NIC_GB_S, PCIE_GB_S = 50.0, 55.0
REPEATS = 3
PARALLEL = {
    "TP16": Parallelism(tensor_ranks=16),
    "EP16, TP16 attention": Parallelism(tensor_ranks=16, expert_ranks=16),
    "EP32, DP attention": Parallelism(tensor_ranks=1, expert_ranks=32),
    "TP8": Parallelism(tensor_ranks=8),
}
CASES = [
    *[("kimi-k2", ranks, variant) for ranks in (256, 1024, 4096) for variant in list(PARALLEL)[:3]],
    ("qwen3-235b-a22b", 8, "TP8"),
    ("glm-4.5-air", 8, "TP8"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case. Bytes are of the busiest host; seconds of the busiest lane of each kind, and its bound."""

    model: str
    ranks: int
    variant: str
    tensors: int
    checkpoint_gb: float
    plan_s: float
    peak_mib: float
    buckets: int
    into_host_gb: float
    pcie_host_gb: float
    busiest_s: dict[str, float]
    bound_s: dict[str, float]
    over_bound: float
    simulated_s: float | None
    ring_buckets: int
    bucket_mib: float
    alternatives_s: dict[str, float | None]


def measure(model: str, ranks: int, variant: str, *, simulate: bool) -> Result:
    """Plan one case, in this process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    manifest, cuts = manifest_of(DECODERS[model].cuts())
    parallelism = PARALLEL[variant]
    needs = [class_needs(cuts, parallelism, number) for number in range(parallelism.classes)]
    hosts = ranks // RANKS_PER_HOST
    topology = uniform(
        ranks=ranks,
        ranks_per_host=RANKS_PER_HOST,
        classes=parallelism.classes,
        holder_sets=[(host,) for host in range(hosts)],
        holder_of=striped(manifest, natural_order(manifest), hosts),
        nic_gb_s=NIC_GB_S,
        pcie_gb_s=PCIE_GB_S,
    )
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        plan = make_routed_plan(manifest, needs, topology)
        took.append(time.perf_counter() - began)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    played = simulate_routed(plan, FleetRates(ring_buckets=32)) if simulate else None
    ways = routed_alternatives(plan, manifest.size_bytes, LaneSpeeds(group_s=1.0))
    return Result(
        model=model,
        ranks=ranks,
        variant=variant,
        tensors=len(manifest.tensors),
        checkpoint_gb=manifest.size_bytes / 1e9,
        plan_s=statistics.median(took),
        peak_mib=peak_mib,
        buckets=plan.buckets,
        into_host_gb=int(plan.demand.lacks_bytes.max()) / 1e9,
        pcie_host_gb=int(plan.demand.need_bytes.max()) / 1e9,
        busiest_s={kind.value: seconds for kind, seconds in plan.busiest_s().items()},
        bound_s={kind.value: seconds for kind, seconds in plan.demand.lower_bound_s.items()},
        over_bound=plan.busiest_over_bound,
        simulated_s=played.seconds if played else None,
        ring_buckets=played.ring_buckets if played else 0,
        bucket_mib=plan.bucket_bytes / 2**20,
        alternatives_s={way.road.value: way.seconds for way in ways},
    )


# -- this project's own updates -------------------------------------------------------------------------------------------
def real_runs() -> list[dict[str, Any]]:
    """Simulated and measured updates of two H200s: rates from the limit measured in the same run, nothing fitted a row."""
    rows = []
    for name in sorted(glob.glob(str(RESULTS / "*-gpu-*.json"))):
        run = json.loads(Path(name).read_text())
        for result in run.get("results", []):
            if (case := result.get("case")) is None:
                continue  # of a real engine
            if not isinstance(case, dict):
                continue
            measured = statistics.median(result["steady_s"])
            simulated = _two_gpus(case, run["limit_gb_s"])
            rows.append(
                {
                    "run": Path(name).stem,
                    "model": f"{case['model']}:{case['layers']}",
                    "ring_mib": case["ring_mib"],
                    "bucket_mib": case["bucket_mib"],
                    "cut": case["cut"],
                    "measured_s": measured,
                    "spread_s": [min(result["steady_s"]), max(result["steady_s"])],
                    "simulated_s": simulated,
                    "error": simulated / measured - 1,
                }
            )
    return rows


def _two_gpus(case: dict[str, Any], limit_gb_s: float) -> float:
    shapes = sorted(MODELS[case["model"]](case["layers"]), key=lambda shape: shape.name)
    manifest = Manifest(
        tensors=tuple(TensorMeta(name=shape.name, dtype=DType.BF16, shape=shape.shape) for shape in shapes)
    )
    layouts = []
    for rank in range(2):
        entries = []
        for shape in shapes:
            start, size = [0] * len(shape.shape), list(shape.shape)
            if shape.dim is not None:
                size[shape.dim] //= 2
                start[shape.dim] = rank * size[shape.dim]
            box = Box(start=tuple(start), shape=tuple(size))
            entries.append(
                LayoutEntry(tensor=shape.name, box=box, group=shape.name.rpartition(".")[0], cut=case["cut"])
            )
        layouts.append(Layout(entries=tuple(entries)))
    plan = make_plan(
        manifest, layouts, agents=2, ring_bytes=case["ring_mib"] << 20, bucket_bytes=case["bucket_mib"] << 20
    )
    return simulate_plan(plan, HostRates(fill_gb_s=(limit_gb_s / 2,) * 2, pull_gb_s=300.0)).seconds


# -- the published table --------------------------------------------------------------------------------------------------
def published() -> dict[str, Any]:
    """checkpoint-engine's schedule with speeds measured on two H200s, and with two numbers fitted to all rows at once."""
    sizes = {}
    for model in {row.model for row in published_schedule.PUBLISHED}:
        cuts = DECODERS[model].cuts()
        sizes[model] = (sum(cut.meta.size_bytes for cut in cuts), len(cuts))
    before = published_schedule.Speeds()
    after = published_schedule.fitted(sizes, before)
    rows = []
    for row in published_schedule.PUBLISHED:
        for p2p in (False, True):
            said = row.p2p_s if p2p else row.broadcast_s
            rows.append(
                {
                    "model": row.model,
                    "gpus": f"{row.gpus} x {row.device}",
                    "way": "P2P" if p2p else "broadcast",
                    "published_s": said,
                    "measured_speeds_s": published_schedule.play(row, *sizes[row.model], before, p2p=p2p),
                    "fitted_s": published_schedule.play(row, *sizes[row.model], after, p2p=p2p),
                }
            )
    return {"measured_speeds": asdict(before), "fitted_speeds": asdict(after), "rows": rows}


# -- printing -------------------------------------------------------------------------------------------------------------
def table_of(title: str, rows: list[list[str]], columns: list[str]) -> Table:
    """Numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_scale(results: list[dict[str, Any]], console: Console) -> None:
    """One line a case."""
    rows = [
        [
            f"{r['model']} {r['variant']}",
            str(r["ranks"]),
            str(r["tensors"]),
            f"{r['plan_s']:.2f}",
            f"{r['peak_mib']:.0f}",
            f"{r['buckets']} x {r['bucket_mib']:.0f}",
            f"{r['into_host_gb']:.1f}",
            f"{r['pcie_host_gb']:.1f}",
            f"{max(r['busiest_s'].values()):.4f}",
            f"{max(r['bound_s'].values()):.4f}",
            f"{r['over_bound']:.4f}",
            "-" if r["simulated_s"] is None else f"{r['simulated_s']:.3f}",
            str(r["ring_buckets"]),
            f"{r['alternatives_s']['broadcast of everything']:.2f}",
            f"{r['alternatives_s']['P2P']:.2f}",
        ]
        for r in results
    ]
    columns = [
        "case",
        "ranks",
        "tensors",
        "plan s",
        "peak MiB",
        "buckets x MiB",
        "NIC GB/host",
        "PCIe GB/host",
        "busiest s",
    ]
    columns += ["bound s", "ratio", "simulated s", "ring", "broadcast s", "P2P s"]
    title = (
        f"{RANKS_PER_HOST} ranks a host, {RANKS_PER_HOST} NICs of {NIC_GB_S:.0f} GB/s, PCIe {PCIE_GB_S:.0f} GB/s a GPU"
    )
    console.print(table_of(title, rows, columns))


def print_checks(runs: list[dict[str, Any]], table: dict[str, Any], console: Console) -> None:
    """Simulated against measured, and against published."""
    rows = [
        [
            f"{r['run']} {r['model']}{'' if r['cut'] else ' whole'}",
            str(r["ring_mib"]),
            str(r["bucket_mib"]),
            f"{r['measured_s']:.4f}",
            f"{r['spread_s'][0]:.4f} to {r['spread_s'][1]:.4f}",
            f"{r['simulated_s']:.4f}",
            f"{100 * r['error']:+.1f}",
        ]
        for r in runs
    ]
    columns = ["two H200s", "ring MiB", "bucket MiB", "measured s", "min to max", "simulated s", "error %"]
    console.print(table_of("this project's updates", rows, columns))
    rows = [
        [
            f"{r['model']} {r['gpus']}",
            r["way"],
            f"{r['published_s']:.2f}",
            f"{r['measured_speeds_s']:.2f}",
            f"{100 * (r['measured_speeds_s'] / r['published_s'] - 1):+.0f}",
            f"{r['fitted_s']:.2f}",
            f"{100 * (r['fitted_s'] / r['published_s'] - 1):+.0f}",
        ]
        for r in table["rows"]
    ]
    columns = ["checkpoint-engine", "way", "published s", "own speeds s", "error %", "2 fitted s", "error %"]
    console.print(table_of("its schedule, simulated", rows, columns))


def in_a_process(case: tuple[str, int, str], *, simulate: bool) -> dict[str, Any]:
    """One case, in a process of its own: peak memory is its own."""
    command = [sys.executable, __file__, "--case", *map(str, case)]
    done = subprocess.run([*command, *([] if simulate else ["--no-simulation"])], capture_output=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """All parts."""
    parser = argparse.ArgumentParser(description="Plan large clusters, and check the simulation.")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--only", default="", help="model")
    parser.add_argument("--no-simulation", action="store_true", help="plan only")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    simulate = not options.no_simulation
    if options.case:
        model, ranks, variant = options.case
        print(json.dumps(asdict(measure(model, int(ranks), variant, simulate=simulate))))
        return
    console = Console(width=200)
    results = []
    for case in CASES:
        if options.only in case[0]:
            results.append(in_a_process(case, simulate=simulate))
            console.print(f"{case}: {results[-1]['plan_s']:.2f} s", highlight=False)
    print_scale(results, console)
    runs, table = real_runs(), published()
    print_checks(runs, table, console)
    if options.out:
        machine = {"cpu": platform.machine(), "python": platform.python_version(), "cores": 1}
        data = {"machine": machine, "scale": results, "two_gpus": runs, "published": table}
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
