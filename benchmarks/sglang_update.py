"""Updates of a real SGLang server on GPUs, beside the peer's, on one and the same server start.

    python benchmarks/sglang_update.py --out results.json [--model qwen3-32b] [--layers 16] [--tp 2] [--peer SCRIPT]
                                       [--server "--attention-backend triton ..."]

SGLang starts with dummy weights. Two checkpoints alternate, by SGLang's own loader and by recorded copies; after each way one
more update to each of them digests the live weights of every rank: both ways must leave the same. The server then generates.
The peer (checkpoint-engine, if its script is given) updates the same server, and knows no pause: its time is its update's alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine_update import Result, print_results, run_peer, timed_updates, versions
from generated import write_checkpoint
from rich.console import Console
from vllm_shapes import shapes_of, write_model

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig
from ckpt_sglang.launch import SglangServer

WAYS = {"loader": False, "replay": True}
PROMPT = (5, 6, 7, 8)


def update_by(
    server: SglangServer, way: str, checkpoints: list[Path], options: argparse.Namespace, size_gb: float
) -> Result:
    """Some updates by one way, each followed by generation, and the digests of what they leave."""
    result = Result(way=way, size_gb=size_gb)
    config = UpdateConfig(digest_content=False, fingerprint=False, replay=WAYS[way], ring_bytes=options.ring * MIB)
    target = ckpt_core.Target(engine="sglang", url=server.url)
    for _ in timed_updates(target, config, result, checkpoints, options.repeats):
        result.tokens.append(server.generate(PROMPT, 8))
    with ckpt_core.Updater([target], config=replace(config, fingerprint=True)) as updater:
        for checkpoint in checkpoints * 2:  # by recorded copies from the second on
            report = updater.update(checkpoint)
            result.fingerprints[checkpoint.name] = [rank.fingerprint for rank in report.ranks]
    return result


def measure(server: SglangServer, checkpoints: list[Path], options: argparse.Namespace, size_gb: float) -> None:
    """All ways and the peer."""
    results: list[Result] = []
    peer: dict[str, Any] = {}
    for number, way in enumerate(WAYS):
        results.append(update_by(server, way, checkpoints, options, size_gb))
        results[-1].wrong = sum(
            results[-1].fingerprints[name] != found for name, found in results[0].fingerprints.items()
        )
        if options.peer and number == 0:
            arguments = (options.model, str(options.layers), str(options.repeats + 1), server.url)
            peer = run_peer(options.peer, arguments, options.tp)
        # a run that is cut short keeps what it has
        data = {"versions": versions("sglang", "torch", "ckpt-core"), "peer": peer}
        options.out.write_text(json.dumps({**data, "results": [asdict(result) for result in results]}, indent=1))
        print_results("SGLang", results, peer, Console(width=150))


def main() -> None:
    """One server, all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-32b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--ring", type=int, default=128, help="MiB; grows to the largest tensor that comes whole")
    parser.add_argument("--server", default="", help="more arguments for SGLang")
    parser.add_argument("--cpu", action="store_true", help="SGLang on this machine's CPU, to try this script")
    parser.add_argument("--peer", type=Path, help="the peer's benchmark script for an SGLang server")
    parser.add_argument("--start-timeout", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shapes = shapes_of(options.model, options.layers)
    size_gb = sum(shape.size_bytes for shape in shapes) / 1e9
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as directory:
        model = Path(directory) / "model"
        checkpoints = [Path(directory) / f"v{seed}.safetensors" for seed in (1, 2)]
        write_model(model, options.model, options.layers)
        writing = [
            threading.Thread(target=write_checkpoint, args=(path, shapes, seed))
            for seed, path in enumerate(checkpoints, start=1)
        ]
        for thread in writing:
            thread.start()
        began = time.monotonic()
        device = {} if options.cpu else {"device_options": ()}
        extra = shlex.split(options.server)
        with SglangServer(
            model, tp=options.tp, load_format="dummy", extra=extra, start_timeout_s=options.start_timeout, **device
        ) as server:
            print(f"SGLang is up after {time.monotonic() - began:.0f} s", flush=True)
            for thread in writing:
                thread.join()
            try:
                measure(server, checkpoints, options, size_gb)
            finally:
                options.out.with_suffix(".log").write_text(server.log())


if __name__ == "__main__":
    sys.exit(main())
