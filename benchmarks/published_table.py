"""Published updates of large models beside this machine's: checkpoint-engine, and this project in three ways.

    python benchmarks/published_table.py --out results.json                       all GPUs, all four models, as much as fits
    python benchmarks/published_table.py --out results.json --budget-gb 24 --peer-packages DIR --stop-after-s 540
    python benchmarks/published_table.py --out results.json --device cpu --world 2 --model tiny-fp8 --skip-peer

Weights are generated, of the true shapes and types, cut to the largest whole number of layers that fits. The limit is measured
around each case, and every element of every rank is checked after each update. Seconds are never scaled to what was not run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from generated import write_checkpoint
from gpu_update import measure_limit
from published_budget import bounds, select
from published_cases import SEED, Row, Setting, Way, run_way
from published_peer import run_peer
from published_report import machine, table_of, write
from rich.console import Console
from shapes import LARGE, MODELS

from ckpt_core.transport.p2p.base import Library
from ckpt_core.transport.p2p.choice import choose

_MODELS = ("glm-4.5-air", "qwen3-235b-a22b", "deepseek-v3.1", "kimi-k2")
_WAYS = {"peer": Way.PEER, "everywhere": Way.EVERYWHERE, "routed": Way.ROUTED, "p2p": Way.P2P}
_CPU_BYTES = 256 << 20


class Run:
    """All models one after the other; what is measured is on disk after every case."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options, self._console = options, console
        self._about = machine(options.world, options.device)
        self._limit_gb_s = self._measured_limit()
        self._rows: list[Row] = []
        self._failures: list[dict[str, Any]] = []
        self._end = time.monotonic() + options.stop_after_s

    def model(self, name: str) -> None:
        """Generate a checkpoint, measure all ways, remove it."""
        options = self._options
        model, _, layers = name.partition(":")
        selection = select(model, self._bounds(), int(layers) if layers else None)
        with tempfile.TemporaryDirectory(prefix="published-", dir=options.directory) as scratch:
            checkpoint = Path(scratch) / "model.safetensors"
            start = time.monotonic()
            write_checkpoint(checkpoint, MODELS[model](selection.layers), SEED)
            self._console.print(f"{selection.name}: generated in {time.monotonic() - start:.1f} s", highlight=False)
            setting = Setting(
                selection=selection,
                checkpoint=checkpoint,
                scratch=Path(scratch),
                world=options.world,
                device=options.device,
                repeats=options.repeats,
                p2p_repeats=options.p2p_repeats,
                library=choose(options.library) if "p2p" in options.ways else Library.MOONCAKE,
            )
            rows = [row for way in options.ways if (row := self._case(_WAYS[way], setting)) is not None]
        if rows:
            self._console.print(table_of(selection, rows))
            for row in rows:
                if row.note:
                    self._console.print(f"{row.way}: {row.note}", highlight=False)

    def _case(self, way: Way, setting: Setting) -> Row | None:
        """One way; what fails is noted, and the others go on."""
        options, start = self._options, time.monotonic()
        try:
            if start > self._end:
                raise TimeoutError(f"not begun: --stop-after-s {options.stop_after_s:.0f} is over")
            if way is Way.PEER:
                timeout_s = min(options.peer_timeout_s, max(30.0, self._end - start))
                row = run_peer(setting, options.peer_packages, timeout_s)
            else:
                row = run_way(way, setting)
        except Exception as error:  # noqa: BLE001 the rest of a lent machine's time is worth more
            self._failures.append({"way": way.value, "case": setting.selection.name, "why": traceback.format_exc()})
            self._console.print(f"{way.value} failed: {error}", highlight=False, markup=False)
            write(options.out, self._about, self._rows, self._failures)
            return None
        before, self._limit_gb_s = self._limit_gb_s, self._measured_limit()
        # a shared host's bus is not the same all the time: the limit right before and right after counts
        row.limit_gb_s = max(before, self._limit_gb_s) * row.gpus / options.world
        self._rows.append(row)
        write(options.out, self._about, self._rows, self._failures)
        self._console.print(f"{way.value}: {time.monotonic() - start:.1f} s with all around it", highlight=False)
        return row

    def _bounds(self) -> dict[str, int]:
        """Bytes of checkpoint by what sets the bound."""
        options = self._options
        on_gpu, joins = options.device == "cuda", "p2p" in options.ways
        found = bounds(
            options.directory,
            gpu_bytes=min(torch.cuda.mem_get_info(index)[0] for index in range(options.world)) if on_gpu else 0,
            gpus=max(1, options.world // 2) if joins else options.world,
            # on CPU the ranks' weights, and what they are compared with, are in host memory too
            copies=1 + ("peer" in options.ways) + 2 * (not on_gpu),
        )
        return found | ({"--budget-gb": int(options.budget_gb * 1e9)} if options.budget_gb else {})

    def _measured_limit(self) -> float:
        if self._options.device != "cuda":
            return _memcpy_gb_s()
        limit = measure_limit(self._options.world)
        torch.cuda.empty_cache()
        return limit


def _memcpy_gb_s() -> float:
    """GB/s copied within host memory: the place of the bus where there is no GPU."""
    source, target = (torch.ones(_CPU_BYTES, dtype=torch.uint8) for _ in range(2))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        rates.append(_CPU_BYTES / 1e9 / (time.perf_counter() - start))
    return max(rates)


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"NAME[:LAYERS] of {', '.join(LARGE)}; repeatable; default: 4")
    parser.add_argument("--ways", default=",".join(_WAYS), help="comma-separated; default: %(default)s")
    parser.add_argument("--skip-peer", action="store_true", help="without checkpoint-engine")
    parser.add_argument("--peer-packages", type=Path, help="folder with checkpoint-engine and what it needs")
    parser.add_argument("--peer-timeout-s", type=float, default=240.0, help="of one model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--world", type=int, default=torch.cuda.device_count() or 2, help="tensor-parallel ranks")
    parser.add_argument("--budget-gb", type=float, help="of a checkpoint; default: what memory allows")
    parser.add_argument("--repeats", type=int, default=5, help="after a first update")
    parser.add_argument("--library", type=Library, help="that joins read by; default: what is installed")
    parser.add_argument("--p2p-repeats", type=int, default=2, help="the same for joins")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for checkpoints; removed afterwards")  # noqa: S108
    parser.add_argument("--stop-after-s", type=float, default=1e9, help="no case begins later")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.ways = [way for way in options.ways.split(",") if not (way == "peer" and options.skip_peer)]
    if unknown := set(options.ways) - set(_WAYS):
        parser.error(f"unknown ways {sorted(unknown)}")
    if unknown := {name.partition(":")[0] for name in options.model or ()} - set(LARGE):
        parser.error(f"unknown models {sorted(unknown)}")
    return options


def main() -> None:
    """Run all cases."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # checkpoints are removed
    run = Run(options, Console(width=160))
    for name in options.model or _MODELS:
        run.model(name)


if __name__ == "__main__":
    main()
