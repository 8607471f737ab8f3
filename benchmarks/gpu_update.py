"""Updates of a mock tensor-parallel engine on this machine's GPUs, against the limit of the bus and against a peer.

    python benchmarks/gpu_update.py --out results.json [--model qwen3-32b:16] [--model qwen3-30b-a3b:12] [--peer SCRIPT]

Everything is measured in one run: the limit (pinned host memory to all GPUs at once), the peer (checkpoint-engine, where
installed), and this project, with agents and ranks in separate processes. Bits are checked after every update.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from generated import write_checkpoint
from mock_engine import MockEngine, gpu_uuid, plugin
from mock_worker import MockOptions
from rich.console import Console
from rich.table import Table
from shapes import MODELS

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig, VerifyLevel
from ckpt_core.metrics import Stage, UpdateReport

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to update: model and layers, ring and bucket in MiB, tensors cut or whole, by the loader or replayed."""

    model: str
    layers: int
    ring_mib: int
    bucket_mib: int
    cut: bool = True
    one_visible: bool = True
    record: bool = False
    digest: bool = False
    verify: str = "none"
    fingerprint: bool = False
    repeats: int = 7

    @property
    def way(self) -> str:
        """For tables."""
        way = "replay" if self.record else "cut" if self.cut else "whole"
        way += "" if self.verify == "none" else f" {self.verify}"
        way += " print" if self.fingerprint else ""
        return way if self.one_visible else f"{way} all-visible"


@dataclass(slots=True, kw_only=True)
class Result:
    """What a case gave. Seconds; GB are 1e9 bytes; the limit is the bus's, measured right before and after."""

    case: Case
    size_gb: float
    limit_gb_s: float = 0.0
    first_s: float = 0.0
    steady_s: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    first_pause_s: float = 0.0
    lock_gb_s: float = 0.0
    digest_s: float = 0.0
    host_digest_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    reached: str = ""
    ring_bytes: int = 0
    gpu_overhead_mib: float = 0.0
    wrong: int = 0
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def agree_s(self) -> float:
        """Attach, layouts, plan and mapping of a steady update."""
        return sum(self.last["stages"].get(stage, 0.0) for stage in ("attach", "layout", "plan"))

    @property
    def median_gb_s(self) -> float:
        """Of the steady updates."""
        return self.size_gb / statistics.median(self.steady_s)


COLUMNS = (
    "case",
    "ring",
    "GB",
    "median s",
    "min",
    "max",
    "GB/s",
    "% limit",
    "agree s",
    "pause s",
    "first/steady",
    "lock GB/s",
    "host digests s",
    "on device s",
    "reached",
    "GPU MiB",
    "wrong",
)


def measure_limit(world: int) -> float:
    """GB/s from pinned host memory into all GPUs at once."""
    host = [torch.empty(GIB, dtype=torch.uint8, pin_memory=True).fill_(7) for _ in range(world)]
    device = [torch.empty(GIB, dtype=torch.uint8, device=f"cuda:{i}") for i in range(world)]
    rates = []
    for _ in range(4):
        _synchronize(world)
        start = time.perf_counter()
        for _ in range(4):
            for target, source in zip(device, host, strict=True):
                target.copy_(source, non_blocking=True)
        _synchronize(world)
        rates.append(4 * world * GIB / 1e9 / (time.perf_counter() - start))
    return max(rates)


def _synchronize(world: int) -> None:
    for index in range(world):
        torch.cuda.synchronize(index)


def run_case(case: Case, checkpoint: Path, seed: int, world: int) -> Result:
    """Updates of one case, the first apart."""
    shapes = MODELS[case.model](case.layers)
    result = Result(case=case, size_gb=sum(shape.size_bytes for shape in shapes) / 1e9)
    uuids = [gpu_uuid(index) for index in range(world)]
    options = MockOptions(
        model=case.model,
        layers=case.layers,
        world=world,
        device="cuda",
        cut=case.cut,
        one_visible=case.one_visible,
        record=case.record,
    )
    config = UpdateConfig(
        ring_bytes=case.ring_mib * MIB,
        bucket_bytes=case.bucket_mib * MIB,
        verify=VerifyLevel(case.verify),
        digest_content=case.digest,
        fingerprint=case.fingerprint,
    )
    free: list[int] = []

    def watch(_stage: Stage, _done: int, _total: int) -> None:
        if not result.steady_s and not result.first_s:  # asking costs the driver time: only in the first update
            free.append(torch.cuda.mem_get_info(0)[0])

    with MockEngine(options, uuids) as engine:
        engine.call("wrong", seed)  # what this check takes, torch keeps: it is not the update's
        before = torch.cuda.mem_get_info(0)[0]
        targets = [ckpt_core.Target(engine="mock", url="mock", handle=engine, plugin=plugin())]
        with ckpt_core.Updater(targets, config=config, on_progress=watch) as updater:
            for number in range(case.repeats + 1):
                engine.call("poison")
                report = updater.update(checkpoint, version=str(number))
                if number == 0:
                    result.gpu_overhead_mib = (before - min(free, default=before)) / MIB
                result.wrong += sum(engine.call("wrong", seed))
                _note(result, report, first=number == 0)
    return result


def _note(result: Result, report: UpdateReport, *, first: bool) -> None:
    details = {
        "stages": report.stages,
        "agents": [{name: getattr(stats, name) for name in stats.__struct_fields__} for stats in report.agents],
        "ranks": [{name: getattr(rank.stats, name) for name in rank.stats.__struct_fields__} for rank in report.ranks],
    }
    if first:
        result.first = details
        result.first_s = report.stages["transfer"]
        result.first_pause_s = report.pause_s
        result.lock_gb_s = result.size_gb / report.lock_s if report.lock_s else 0.0
        result.digest_s = report.digest_s
        return
    result.last = details
    result.steady_s.append(report.stages["transfer"])
    result.pause_s.append(report.pause_s)
    result.ring_bytes = report.ring_bytes
    result.host_digest_s.append(report.digest_s)
    result.verify_s.append(max(rank.stats.digest_s + rank.stats.fingerprint_s for rank in report.ranks))
    result.reached = report.verified


def run_peer(script: Path, model: str, layers: int, repeats: int, world: int) -> dict[str, Any]:
    """The peer's own benchmark; its JSON line, or why there is none."""
    command = ["torchrun", f"--nproc-per-node={world}", str(script), model, str(layers), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": done.stderr[-800:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def print_results(results: list[Result], peers: dict[str, dict[str, Any]], limit: float, console: Console) -> None:
    """One table for all."""
    table = Table(
        title=f"limit of the bus, all GPUs at once: {limit:.1f} GB/s at best; % is of the limit around each case"
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "case" else "right")
    for result in results:
        case, steady = result.case, result.steady_s
        table.add_row(
            f"{case.model}:{case.layers} {case.way}",
            f"{result.ring_bytes / MIB:.0f}/{case.bucket_mib}",
            f"{result.size_gb:.1f}",
            f"{statistics.median(steady):.4f}",
            f"{min(steady):.4f}",
            f"{max(steady):.4f}",
            f"{result.median_gb_s:.1f}",
            f"{100 * result.median_gb_s / result.limit_gb_s:.1f}",
            f"{result.agree_s:.3f}",
            f"{statistics.median(result.pause_s):.3f}",
            f"{result.first_pause_s / statistics.median(result.pause_s):.2f}",
            f"{result.lock_gb_s:.1f}",
            f"{statistics.median(result.host_digest_s):.2f}" if result.case.digest else "-",
            f"{statistics.median(result.verify_s):.4f}",
            result.reached,
            f"{result.gpu_overhead_mib:.0f}",
            str(result.wrong),
        )
    for model, peer in peers.items():
        if "update" not in peer:
            console.print(f"peer {model}: {peer}")
            continue
        rates = sorted(peer["GB"] / second for second in peer["update"])
        table.add_row(
            f"checkpoint-engine {model}",
            "",
            f"{peer['GB']:.1f}",
            f"{statistics.median(peer['update']):.4f}",
            f"{min(peer['update']):.4f}",
            f"{max(peer['update']):.4f}",
            f"{statistics.median(rates):.1f}",
            f"{100 * statistics.median(rates) / limit:.1f}",
            "",
            f"{statistics.median(peer['update']):.3f}",
            f"{peer['update'][0] / statistics.median(peer['update'][1:]):.2f}",
            f"{peer['GB'] / peer['register']:.1f}",
            "-",
            "-",
            "-",
            "",
            "",
        )
    console.print(table)


def machine(world: int) -> dict[str, str]:
    """What ran it."""
    return {"gpus": f"{world} x {torch.cuda.get_device_name(0)}", **host()}


def host() -> dict[str, str]:
    """The same without GPUs."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": str(os.cpu_count()),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="NAME:LAYERS; repeatable")
    parser.add_argument("--ring", type=int, action="append", help="MiB of ring per GPU; repeatable")
    parser.add_argument("--bucket", type=int, action="append", help="MiB per bucket; repeatable")
    parser.add_argument("--whole", action="store_true", help="also with whole tensors")
    parser.add_argument("--record", action="store_true", help="also with the loader recorded and replayed")
    parser.add_argument(
        "--verify", action="store_true", help="also with what arrives and lives compared, between two without"
    )
    parser.add_argument("--all-visible", action="store_true", help="also with all GPUs visible to every rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--world", type=int, default=torch.cuda.device_count())
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are generated"
    )
    parser.add_argument("--peer", type=Path, help="benchmark script of the peer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    console = Console(width=160)
    limits = [measure_limit(options.world)]
    results: list[Result] = []
    peers: dict[str, dict[str, Any]] = {}
    for name in options.model or ["qwen3-32b:16", "qwen3-30b-a3b:12"]:
        model, layers = name.split(":")
        checkpoint = options.directory / f"{model}-{layers}.safetensors"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, MODELS[model](int(layers)), seed=1)
        sizes = [(ring, bucket) for ring in options.ring or [128] for bucket in options.bucket or [ring // 4]]
        cases = [
            Case(model=model, layers=int(layers), ring_mib=ring, bucket_mib=bucket, repeats=options.repeats)
            for ring, bucket in sizes
            if bucket <= ring
        ]
        cases[0] = replace(cases[0], digest=True)
        if options.whole:
            cases.append(replace(cases[0], cut=False, digest=False))
        if options.record:
            cases.append(replace(cases[0], record=True, digest=False))
        if options.verify:
            replayed = replace(cases[0], record=True, digest=True)
            cases += [
                replace(replayed, digest=False),
                replace(replayed, verify="live"),
                replace(replayed, verify="live", fingerprint=True),
                replace(replayed, verify="arrival"),
                replace(replayed, digest=False),
            ]
        if options.all_visible:
            cases.append(replace(cases[0], one_visible=False, digest=False))
        for case in cases:
            console.print(f"{case}", highlight=False)
            results.append(run_case(case, checkpoint, 1, options.world))
            # a shared host's bus is not the same all the time: the limit right before and right after counts
            limits.append(measure_limit(options.world))
            results[-1].limit_gb_s = max(limits[-2:])
        if options.peer:
            peers[name] = run_peer(options.peer, model, int(layers), options.repeats, options.world)
            limits.append(measure_limit(options.world))
        write_results(options, results, peers, limits)  # a run that is cut short keeps what it has
    print_results(results, peers, max(limits), console)


def write_results(
    options: argparse.Namespace, results: list[Result], peers: dict[str, dict[str, Any]], limits: list[float]
) -> None:
    """All figures, as JSON."""
    data = {
        "machine": machine(options.world),
        "limit_gb_s": max(limits),
        "limits_gb_s": limits,
        "results": [asdict(result) for result in results],
        "peers": peers,
    }
    options.out.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    sys.exit(main())
