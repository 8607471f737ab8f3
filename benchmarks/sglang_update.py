"""Updates of a real SGLang server on GPUs, beside the peer's, on one and the same server start.

    python benchmarks/sglang_update.py --out results.json [--model qwen3-32b] [--layers 16] [--tp 2] [--peer SCRIPT]
                                       [--server "--attention-backend triton ..."]

SGLang starts with dummy weights. Two checkpoints alternate, by SGLang's own loader and by recorded copies; after each way one
more update to each of them digests the live weights of every rank: both ways must leave the same. The server then generates.
The peer (checkpoint-engine, if its script is given) updates the same server, and knows no pause: its time is its update's alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine_update import Result, compare_ways, parse_options, timed_updates
from generated import write_checkpoint
from vllm_shapes import shapes_of, write_model

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig
from ckpt_sglang.launch import SglangServer

WAYS = {"loader": False, "replay": True}
PROMPT = (5, 6, 7, 8)


def update_by(
    server: SglangServer,
    way: str,
    *,
    checkpoints: list[Path],
    expected: dict[str, list[str]],
    options: argparse.Namespace,
    size_gb: float,
) -> Result:
    """Some updates by one way, each followed by generation, and the digests of what they leave: the first way's are expected."""
    result = Result(way=way, size_gb=size_gb)
    config = UpdateConfig(digest_content=False, fingerprint=False, replay=WAYS[way], ring_bytes=options.ring * MIB)
    target = ckpt_core.Target(engine="sglang", url=server.url)
    for _ in timed_updates(target, config, result, checkpoints, options.repeats):
        result.tokens.append(server.generate(PROMPT, 8))
    with ckpt_core.Updater([target], config=replace(config, fingerprint=True)) as updater:
        for checkpoint in checkpoints * 2:  # by recorded copies from the second on
            report = updater.update(checkpoint)
            result.fingerprints[checkpoint.name] = [rank.fingerprint for rank in report.ranks]
    for name, found in result.fingerprints.items():
        result.wrong += expected.setdefault(name, found) != found
    return result


def main() -> None:
    """One server, all ways."""
    options = parse_options(__doc__, "SGLang", _add_options)
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
                expected: dict[str, list[str]] = {}
                by_way = partial(
                    update_by, server, checkpoints=checkpoints, expected=expected, options=options, size_gb=size_gb
                )
                compare_ways("SGLang", server.url, list(WAYS), by_way, options)
            finally:
                options.out.with_suffix(".log").write_text(server.log())


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action="store_true", help="SGLang on this machine's CPU, to try this script")


if __name__ == "__main__":
    sys.exit(main())
