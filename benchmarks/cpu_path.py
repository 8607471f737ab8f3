"""Update a 1 GiB generated model in the reference engine on CPU, 1 and 2 ranks, beside a plain memcpy of the same bytes.

    python benchmarks/cpu_path.py --out results.json

Per case: GB/s of the transfer (begin to last rank verified) with and without digests, what share of memcpy that is, where
the seconds of a rank and of an agent went, and how much memory the update took beyond ring, pool and weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import ckpt_core
from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core.config import MIB, UpdateConfig, VerifyLevel
from ckpt_core.metrics import UpdateReport

_SAMPLE_S = 0.005


@dataclass(slots=True, kw_only=True)
class Result:
    """What one case gave; seconds, medians over the steady updates."""

    ranks: int
    verify: str
    transfer_s: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    first_s: float = 0.0
    wait_s: float = 0.0
    load_s: float = 0.0
    digest_s: float = 0.0
    copy_s: float = 0.0
    ring_bytes: int = 0
    agent_peak_bytes: int = 0
    rank_growth_bytes: int = 0


def memcpy_gb_s(path: Path, repeats: int) -> list[float]:
    """Rate of one thread that copies the checkpoint from the page cache into memory that was written before."""
    source = np.memmap(path, dtype=np.uint8, mode="r")
    target = np.ones_like(source)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        rates.append(source.size / 1e9 / (time.perf_counter() - start))
    return rates


class MemoryWatch(threading.Thread):
    """Peaks of anonymous and shared memory of processes, sampled; files that are mapped in place do not count."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__(daemon=True)
        self.agents: tuple[int, ...] = ()
        self._ranks = ranks
        self._before = sum(_resident(pid, "RssAnon") for pid in ranks)
        self._end = threading.Event()
        self.agent_peak = 0
        self.rank_growth = 0

    def run(self) -> None:
        """Sample until closed."""
        while not self._end.wait(_SAMPLE_S):
            agents = sum(_resident(pid, "RssAnon") + _resident(pid, "RssShmem") for pid in self.agents)
            growth = sum(_resident(pid, "RssAnon") for pid in self._ranks) - self._before
            self.agent_peak = max(self.agent_peak, agents)
            self.rank_growth = max(self.rank_growth, growth)

    def close(self) -> None:
        """Stop sampling."""
        self._end.set()
        self.join()


def _resident(pid: int, kind: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), 0)


def run_case(checkpoint: Path, ranks: int, verify: VerifyLevel, options: argparse.Namespace) -> Result:
    """One engine, several updates, the first apart."""
    result = Result(ranks=ranks, verify=verify.value)
    config = UpdateConfig(
        ring_bytes=options.ring * MIB,
        bucket_bytes=options.bucket * MIB,
        verify=verify,
        fingerprint=verify is not VerifyLevel.NONE,
    )
    with ReferenceServer(checkpoint.parent, tp=ranks, load_format="dummy") as server:
        target = ckpt_core.Target(engine="reference", url=server.url)
        with ckpt_core.Updater([target], config=config) as updater:
            result.first_s = updater.update(checkpoint).stages["transfer"]
            watch = MemoryWatch(server.rank_pids)
            watch.agents = updater.agent_pids
            watch.start()
            reports = [updater.update(checkpoint) for _ in range(options.repeats)]
            watch.close()
    _note(result, reports)
    result.agent_peak_bytes, result.rank_growth_bytes = watch.agent_peak, watch.rank_growth
    return result


def _note(result: Result, reports: list[UpdateReport]) -> None:
    result.transfer_s = [report.stages["transfer"] for report in reports]
    result.pause_s = [report.pause_s for report in reports]
    result.ring_bytes = reports[-1].ring_bytes
    for name in ("wait_s", "load_s", "digest_s"):
        values = [getattr(rank.stats, name) for report in reports for rank in report.ranks]
        setattr(result, name, statistics.median(values))
    result.copy_s = statistics.median(agent.copy_s for report in reports for agent in report.agents)


def print_results(results: list[Result], memcpy: list[float], size_bytes: int, console: Console) -> None:
    """The table."""
    base = statistics.median(memcpy)
    table = Table(
        title=f"{size_bytes / 1e9:.2f} GB, {os.cpu_count()} cores; memcpy by one thread: {base:.2f} GB/s "
        f"({min(memcpy):.2f} to {max(memcpy):.2f})"
    )
    names = ("ranks", "verify", "GB/s", "of memcpy", "first s", "median s", "pause s")
    for name in (*names, "rank: wait", "digest", "load", "agent: copy", "agents MiB", "ranks + MiB"):
        table.add_column(name, justify="right")
    for result in results:
        rate = size_bytes / 1e9 / statistics.median(result.transfer_s)
        table.add_row(
            str(result.ranks),
            result.verify,
            f"{rate:.2f}",
            f"{rate / base:.2f}",
            f"{result.first_s:.3f}",
            f"{statistics.median(result.transfer_s):.3f}",
            f"{statistics.median(result.pause_s):.3f}",
            f"{result.wait_s:.3f}",
            f"{result.digest_s:.3f}",
            f"{result.load_s:.3f}",
            f"{result.copy_s:.3f}",
            f"{result.agent_peak_bytes / MIB:.0f}",
            f"{result.rank_growth_bytes / MIB:.0f}",
        )
    console.print(table)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=19, help="19 make 1 GiB")
    parser.add_argument("--ring", type=int, default=16, help="MiB")
    parser.add_argument("--bucket", type=int, default=4, help="MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as directory:
        model = make_tiny(
            Path(directory) / "model",
            arch="qwen3",
            layers=options.layers,
            hidden=1536,
            heads=12,
            kv_heads=6,
            head_dim=128,
            intermediate=4608,
            vocab=12000,
        )
        checkpoint = model / "model.safetensors"
        size_bytes = checkpoint.stat().st_size
        memcpy = memcpy_gb_s(checkpoint, options.repeats)
        results = [
            run_case(checkpoint, ranks, verify, options)
            for ranks in (1, 2)
            for verify in (VerifyLevel.NONE, VerifyLevel.ARRIVAL)
        ]
        memcpy += memcpy_gb_s(checkpoint, options.repeats)
    print_results(results, memcpy, size_bytes, Console(width=150))
    data = {
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "date": time.strftime("%Y-%m-%d")},
        "size_bytes": size_bytes,
        "memcpy_gb_s": memcpy,
        "results": [asdict(result) for result in results],
    }
    options.out.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
