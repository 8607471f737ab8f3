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
import shlex
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from engine_update import Result, compare_ways, parse_options, timed_updates
from generated import write_checkpoint
from vllm_shapes import shapes_of, write_model

import ckpt_core
from ckpt_core.config import MIB, UpdateConfig
from ckpt_vllm.launch import NATIVE, VllmServer

SEED = 1
# what each is called here: how the plugin loads, and whether recorded slices are copied instead
WAYS = {"replay": ("direct", True), "direct": ("direct", False), "reload": ("reload", False), "thin": ("reload", True)}
PROMPT = (5, 6, 7, 8)


def update_by(server: VllmServer, way: str, *, checkpoint: Path, options: argparse.Namespace, size_gb: float) -> Result:
    """Some updates by one way, each proved and followed by generation."""
    result = Result(way=way, size_gb=size_gb)
    taken, replay = WAYS[way]
    server.rpc("ckpt_take_way", way=taken)
    config = UpdateConfig(digest_content=False, fingerprint=False, replay=replay, ring_bytes=options.ring * MIB)
    target = ckpt_core.Target(engine="vllm", url=server.url)
    server.rpc("ckpt_spoil")
    for _ in timed_updates(target, config, result, [checkpoint], options.repeats):
        result.wrong += count_wrong(server, options) if options.check else 0
        result.tokens.append(server.generate(PROMPT, 8))
        server.rpc("ckpt_spoil")
    return result


def count_wrong(server: VllmServer, options: argparse.Namespace) -> int:
    """Live elements of all ranks that are not the checkpoint's."""
    answers = server.rpc("ckpt_wrong", model=options.model, layers=options.layers, seed=SEED)
    return sum(answer["wrong"] for answer in answers)


def main() -> None:
    """One server, all ways."""
    options = parse_options(__doc__, "vLLM", _add_options)
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
                by_way = partial(update_by, server, checkpoint=checkpoint, options=options, size_gb=size_gb)
                compare_ways("vLLM", server.url, options.way or list(WAYS), by_way, options)
            finally:
                options.out.with_suffix(".log").write_text(server.log())


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", action="append", choices=WAYS, help="repeatable")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-check", dest="check", action="store_false", help="where the CPU packs weights")


if __name__ == "__main__":
    sys.exit(main())
