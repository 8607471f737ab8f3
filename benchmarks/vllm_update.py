"""Updates of a real vLLM server, beside the peer's, on one and the same server start.

    python benchmarks/vllm_update.py --out results.json [--model qwen3-32b] [--layers 16] [--tp 2] [--peer SCRIPT]
                                     [--server "--compilation-config ..."]

vLLM starts with dummy weights and CUDA graphs (or what --server says). A whole update is from the call to the last resume; of
it, the pause is what clients notice. Weights are spoilt before each update and compared on the device after it; the server then
generates. The peer (checkpoint-engine, if its script is given) updates the same server, and knows no pause: its time is
its update's alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from generated import write_checkpoint
from rich.console import Console
from rich.table import Table
from vllm_shapes import shapes_of, write_model

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig
from ckpt_core.metrics import UpdateReport
from ckpt_vllm.launch import NATIVE, VllmServer

SEED = 1
# what each is called here: how the plugin loads, and whether recorded slices are copied instead
WAYS = {"replay": ("direct", True), "direct": ("direct", False), "reload": ("reload", False), "thin": ("reload", True)}
PROMPT = (5, 6, 7, 8)
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


def update_by(server: VllmServer, way: str, checkpoint: Path, options: argparse.Namespace, size_gb: float) -> Result:
    """Some updates by one way, each proved and followed by generation."""
    result = Result(way=way, size_gb=size_gb)
    taken, replay = WAYS[way]
    server.rpc("ckpt_take_way", way=taken)
    config = UpdateConfig(digest_content=False, fingerprint=False, replay=replay, ring_bytes=options.ring * MIB)
    targets = [ckpt_core.Target(engine="vllm", url=server.url)]
    with ckpt_core.Updater(targets, config=config) as updater:
        for number in range(options.repeats + 1):
            server.rpc("ckpt_spoil")
            start = time.perf_counter()
            report = updater.update(checkpoint, version=f"{way}-{number}")
            _note(result, report, time.perf_counter() - start, first=number == 0)
            result.wrong += count_wrong(server, options) if options.check else 0
            result.tokens.append(server.generate(PROMPT, 8))
    return result


def count_wrong(server: VllmServer, options: argparse.Namespace) -> int:
    """Live elements of all ranks that are not the checkpoint's."""
    answers = server.rpc("ckpt_wrong", model=options.model, layers=options.layers, seed=SEED)
    return sum(answer["wrong"] for answer in answers)


def _note(result: Result, report: UpdateReport, whole_s: float, *, first: bool) -> None:
    if first:
        result.first_s = report.pause_s
        result.first_stages = report.stages
        return
    result.whole_s.append(whole_s)
    result.pause_s.append(report.pause_s)
    result.stages = report.stages
    result.ring_mib = report.ring_bytes / MIB
    result.ranks = [{name: getattr(rank.stats, name) for name in _OF_RANKS} for rank in report.ranks]


def run_peer(options: argparse.Namespace, url: str) -> dict[str, Any]:
    """The peer's JSON line, or why there is none."""
    command = ["torchrun", f"--nproc-per-node={options.tp}", str(options.peer)]
    command += [options.model, str(options.layers), str(options.repeats + 1), url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    except subprocess.TimeoutExpired as error:
        return {"error": f"no end within {error.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"error": done.stderr[-1500:]}
    return found


def print_results(results: list[Result], peer: dict[str, Any], console: Console) -> None:
    """One table for all."""
    table = Table(title="seconds of a steady update of a real vLLM")
    for name in (
        "way",
        "GB",
        "ring MiB",
        "pause median",
        "min",
        "max",
        "transfer",
        "GB/s",
        "first",
        "whole call",
        "recorded %",
        "GB a rank",
        "wrong",
    ):
        table.add_column(name, justify="left" if name == "way" else "right")
    for result in results:
        pause = statistics.median(result.pause_s)
        table.add_row(
            result.way,
            f"{result.size_gb:.1f}",
            f"{result.ring_mib:.0f}",
            f"{pause:.4f}",
            f"{min(result.pause_s):.4f}",
            f"{max(result.pause_s):.4f}",
            f"{result.stages['transfer']:.4f}",
            f"{result.size_gb / pause:.1f}",
            f"{result.first_s:.3f}",
            f"{statistics.median(result.whole_s):.3f}",
            f"{100 * min(rank['recorded_share'] for rank in result.ranks):.2f}",
            f"{max(_pulled(rank) for rank in result.ranks) / 1e9:.2f}",
            str(result.wrong),
        )
    if "update" in peer:
        steady = peer["update"][1:]
        median = statistics.median(steady)
        row = [f"{median:.4f}", f"{min(steady):.4f}", f"{max(steady):.4f}", "", f"{peer['GB'] / median:.1f}"]
        table.add_row("checkpoint-engine", f"{peer['GB']:.1f}", "", *row, f"{peer['update'][0]:.3f}", "", "", "", "")
    elif peer:
        console.print(f"peer: {peer}")
    console.print(table)


def _pulled(rank: dict[str, Any]) -> int:
    """Bytes that a rank read out of rings: where all is replayed, only its own slices."""
    return rank["replayed_bytes"] or rank["received_bytes"]


def main() -> None:
    """One server, all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-32b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ring", type=int, default=128, help="MiB; grows to the largest tensor that comes whole")
    parser.add_argument("--way", action="append", choices=WAYS, help="repeatable")
    parser.add_argument("--server", default="", help="more arguments for vLLM")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-check", dest="check", action="store_false", help="where the CPU packs weights")
    parser.add_argument("--peer", type=Path, help="the peer's benchmark script for a vLLM server")
    parser.add_argument("--start-timeout", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shapes = shapes_of(options.model, options.layers)
    size_gb = sum(shape.size_bytes for shape in shapes) / 1e9
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as directory:
        model, checkpoint = Path(directory) / "model", Path(directory) / "v1.safetensors"
        write_model(model, options.model, options.layers)
        writing = threading.Thread(target=write_checkpoint, args=(checkpoint, shapes, SEED))
        writing.start()
        road = (*NATIVE, "--worker-extension-cls", "vllm_extension.BenchExtension")
        began = time.monotonic()
        with VllmServer(
            model,
            tp=options.tp,
            load_format="dummy",
            road=road,
            extra=shlex.split(options.server),
            eager=options.eager,
            max_model_len=512,
            start_timeout_s=options.start_timeout,
        ) as server:
            print(f"vLLM is up after {time.monotonic() - began:.0f} s", flush=True)
            writing.join()
            try:
                _measure(server, checkpoint, options, size_gb)
            finally:
                options.out.with_suffix(".log").write_text(server.log())


def _measure(server: VllmServer, checkpoint: Path, options: argparse.Namespace, size_gb: float) -> None:
    results: list[Result] = []
    peer: dict[str, Any] = {}
    for number, way in enumerate(options.way or list(WAYS)):
        results.append(update_by(server, way, checkpoint, options, size_gb))
        if options.peer and number == 0:
            peer = run_peer(options, server.url)
        # a run that is cut short keeps what it has
        data = {"versions": _versions(), "results": [asdict(result) for result in results], "peer": peer}
        options.out.write_text(json.dumps(data, indent=1))
        print_results(results, peer, Console(width=150))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("vllm", "torch", "ckpt-core")} | {"date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    sys.exit(main())
