"""checkpoint-engine 0.4.2's broadcast into a stand-in engine, on the shapes and values of this folder's models.

    torchrun --nproc-per-node 2 benchmarks/peer_checkpoint_engine.py '{"checkpoint": "/dev/shm/m.safetensors",
        "model": "glm-4.5-air", "layers": 3, "repeats": 5, "seed": 1}'

Each process is a parameter server with an even share of the checkpoint's bytes, and starts the rank on its GPU as a process of its
own. Ranks get whole tensors and keep their tensor-parallel slices, as this project's stand-in does. The first process prints JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generated import expected_values
from safetensors import safe_open
from shapes import MODELS, Shape

_NAME = "benchmark"
_PATIENCE_S = 300.0
_MIB = 1 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked for, and which of the processes this is."""

    checkpoint: str
    model: str
    layers: int
    repeats: int
    seed: int
    rank: int
    world: int


class Rank:
    """One tensor-parallel rank: a parameter for each tensor, filled from whole tensors."""

    def __init__(self, job: Job) -> None:
        torch.cuda.set_device(job.rank)
        self._job, self._device = job, torch.device("cuda", job.rank)
        self._shapes = {shape.name: shape for shape in MODELS[job.model](job.layers)}
        self._slices = {name: shape.box(job.rank, job.world).slices for name, shape in self._shapes.items()}
        self._weights = {name: self._empty(shape) for name, shape in self._shapes.items()}
        self.lowest_free = sys.maxsize

    def _empty(self, shape: Shape) -> torch.Tensor:
        size = shape.box(self._job.rank, self._job.world).shape
        return _bits(torch.zeros(size, dtype=getattr(torch, shape.dtype.torch_name), device=self._device))

    def load(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Keep this rank's slices."""
        for name, values in weights:
            self._weights[name].copy_(_bits(values)[self._slices[name]])
        self.lowest_free = min(self.lowest_free, torch.cuda.mem_get_info()[0])

    def wrong_then_poison(self) -> int:
        """Elements that are not the checkpoint's; afterwards all are spoilt, and what the check took is given back."""
        wrong = 0
        for name, weights in self._weights.items():
            shape = self._shapes[name]
            expected = expected_values(name, shape.shape, self._job.seed, self._device, shape.dtype)
            wrong += int((weights != _bits(expected)[self._slices[name]]).sum())
            weights.fill_(-1)
        del expected
        torch.cuda.empty_cache()
        return wrong


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 as integers: not all kernels take it."""
    return tensor.view(torch.int8) if tensor.itemsize == 1 else tensor


def _rank_main(job: Job, orders: Any, answers: Any) -> None:
    """Take updates as they are ordered; the first answer is the GPU's free memory before there is a server."""
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    rank, context = Rank(job), zmq.Context()
    rank.wrong_then_poison()
    torch.cuda.synchronize()
    answers.put(torch.cuda.mem_get_info()[0])
    uuid = f"GPU-{torch.cuda.get_device_properties(job.rank).uuid!s}"
    while (paths := _next(orders)) is not None:
        update_weights_from_ipc(
            context, dict(paths)[uuid], device_id=job.rank, run=rank.load, post_hook=torch.cuda.synchronize
        )
        answers.put((rank.lowest_free, rank.wrong_then_poison()))


def _next(orders: Any) -> Any:
    """The next order; None where there are no more, or nobody is left to give any."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        try:
            return orders.get(timeout=5.0)
        except queue.Empty:
            continue
    return None


def share(shapes: Sequence[Shape], rank: int, world: int) -> list[str]:
    """Names of a server's tensors: largest first, each to the server that has least."""
    held, mine = [0] * world, []
    for shape in sorted(shapes, key=lambda shape: -shape.size_bytes):
        least = held.index(min(held))
        held[least] += shape.size_bytes
        if least == rank:
            mine.append(shape.name)
    return mine


def serve(job: Job) -> dict[str, Any]:
    """Register, then update over and over."""
    context = multiprocessing.get_context("spawn")
    orders, answers = context.Queue(), context.Queue()
    process = context.Process(target=_rank_main, args=(job, orders, answers), daemon=True)
    process.start()
    before = answers.get(timeout=_PATIENCE_S)
    server, times = _registered(job)
    seconds, lowest, wrong = [], before, 0
    for number in range(job.repeats + 1):
        _together(job, number)
        start = time.perf_counter()
        server.update(_NAME, orders.put)
        seconds.append(time.perf_counter() - start)
        free, more = answers.get(timeout=_PATIENCE_S)
        lowest, wrong = min(lowest, free), wrong + more
    orders.put(None)
    process.join(30)
    server.unregister_checkpoint(_NAME)
    return times | {"update": seconds, "gpu_mib": (before - lowest) / _MIB, "wrong": wrong}


def _together(job: Job, number: int) -> None:
    """Wait for the other servers: one that begins early would count its waiting. The peer's own barrier holds only once."""
    results = Path(os.environ["PEER_RESULTS"])
    (results / f"ready-{number}-{job.rank}").touch()
    deadline = time.monotonic() + _PATIENCE_S
    while not all((results / f"ready-{number}-{rank}").exists() for rank in range(job.world)):
        if time.monotonic() > deadline:
            raise TimeoutError("a server does not come")
        time.sleep(0.001)


def _registered(job: Job) -> tuple[Any, dict[str, float]]:
    """A server with its share in pinned memory, and what that took."""
    if not any(Path("/sys/class/infiniband").glob("*")):
        sys.modules["mooncake"] = None  # type: ignore[assignment]  # with it, and no RDMA device, the server refuses to start
    from checkpoint_engine.ps import ParameterServer

    with safe_open(job.checkpoint, framework="pt") as file:
        mine = {name: file.get_tensor(name) for name in share(MODELS[job.model](job.layers), job.rank, job.world)}
    for values in mine.values():  # to map the file's pages is not the server's work
        values.view(-1).view(torch.uint8)[::_PAGE_BYTES].sum()
    server = ParameterServer(auto_pg=True)
    start = time.perf_counter()
    server.register_checkpoint(_NAME, named_tensors=mine)
    registered = time.perf_counter()
    server.gather_metas(_NAME)
    return server, {"register": registered - start, "gather_metas": time.perf_counter() - registered}


def main() -> None:
    """One process of torchrun's."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = serve(Job(**json.loads(sys.argv[1]), rank=rank, world=world))
    # each process's own figures, where the parent finds them: torchrun mixes what they print
    Path(os.environ["PEER_RESULTS"], f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
