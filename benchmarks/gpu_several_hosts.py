"""GPUs as hosts: ranks and agents in an IPC namespace for each GPU, relays over loopback. Needs root, nsenter and two GPUs.

    python benchmarks/gpu_several_hosts.py --model qwen3-32b --layers 8 --json results.json

Two readings: `striped`, where half of what a rank needs comes from the other "host" over TCP; and `everywhere`, where nothing
does and each GPU takes its slices, columns of tensors among them, out of its own pool. The engine is the benchmarks' stand-in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from generated import write_checkpoint
from mock_engine import MockEngine, gpu_uuid, plugin
from mock_worker import MockOptions
from rich.console import Console
from rich.table import Table
from shapes import MODELS

import ckpt_core
from ckpt_core import cluster
from ckpt_core.config import child_environment

_PORT = 7777
_SEED = 1


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-32b", choices=sorted(MODELS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        checkpoint = Path(scratch) / "model.safetensors"
        write_checkpoint(checkpoint, MODELS[options.model](options.layers), _SEED)
        rows = measured(options, checkpoint, Path(scratch) / "keys")
    table = Table(
        title=f"{options.model}, {options.layers} layers, two hosts of one GPU each; medians of {options.repeats}"
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def measured(options: argparse.Namespace, checkpoint: Path, keys: Path) -> list[dict[str, object]]:
    """A row for each reading."""
    ranks_of = MockOptions(model=options.model, layers=options.layers, world=2, device="cuda", apart=True)
    uuids = [gpu_uuid(index) for index in range(2)]
    controller, agent = cluster.create(keys, f"tcp://127.0.0.1:{_PORT}")
    with ExitStack() as stack:
        ranks = stack.enter_context(MockEngine(ranks_of, uuids))
        for number, (pid, uuid) in enumerate(zip(ranks.pids, uuids, strict=True)):
            enter = ["nsenter", f"--ipc=/proc/{pid}/ns/ipc", sys.executable, "-m", "ckpt_core", "agent"]
            command = [*enter, "--cluster", str(agent), "--address", f"127.0.0.{number + 2}"]
            service = subprocess.Popen(command, env=child_environment(visible_gpu=uuid))
            stack.callback(service.wait, 15)
            stack.callback(service.terminate)
        readings = (ckpt_core.Reading.STRIPED, ckpt_core.Reading.EVERYWHERE)
        return [_row(options, checkpoint, ranks, controller, reading) for reading in readings]


def _row(
    options: argparse.Namespace, checkpoint: Path, ranks: MockEngine, controller: Path, reading: ckpt_core.Reading
) -> dict[str, object]:
    target = ckpt_core.Target(engine="mock", url="mock", handle=ranks, plugin=plugin())
    config = ckpt_core.UpdateConfig(fingerprint=False, digest_content=False)
    members = ckpt_core.Cluster.load(controller, hosts=2, reading=reading)
    with ckpt_core.Updater([target], config=config, cluster=members) as updater:
        first = updater.update(checkpoint)
        reports = []
        for _ in range(options.repeats):
            ranks.call("poison")
            reports.append(updater.update(checkpoint))
    seconds = statistics.median(max(agent.total_s for agent in report.agents) for report in reports)
    last = reports[-1]
    return {
        "reading": reading.value,
        "checkpoint GB": last.size_bytes / 1e9,
        "first s": max(agent.total_s for agent in first.agents),
        "seconds": seconds,
        "pause s": statistics.median(report.pause_s for report in reports),
        "GB in a GPU": max(agent.sent_bytes for agent in last.agents) / 1e9,
        "GB/s in all GPUs": sum(agent.sent_bytes for agent in last.agents) / 1e9 / seconds,
        "GB from the other host": max(host.network_in_bytes for host in last.hosts) / 1e9,
        "wrong elements": sum(ranks.call("wrong", _SEED)),
    }


if __name__ == "__main__":
    main()
