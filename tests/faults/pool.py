"""Cases on several stages at once: most of what a case takes is waiting for a deadline."""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import trial
from cases import Case
from stage import TP, World, clean

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.launch import ReferenceServer

STAGES = 5


@contextmanager
def running(cases: Sequence[Case], stages: int = STAGES) -> Iterator[dict[Case, Future[trial.Result]]]:
    """The results to come of all cases, in about their order."""
    world = make_world()
    pool = ProcessPoolExecutor(min(stages, len(cases)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield {case: pool.submit(trial.perform, world, case) for case in cases}
    finally:
        pool.shutdown(cancel_futures=True)
        clean(world)


def make_world() -> World:
    """Two checkpoints, and what a fresh start on each of them holds."""
    root = tempfile.mkdtemp(prefix="ckpt-faults-")
    sizes = {"layers": 1, "hidden": 48, "heads": 6, "kv_heads": 6, "intermediate": 96}
    a = make_tiny(Path(root) / "a", seed=1, **sizes)
    b = perturb(a, Path(root) / "b", seed=2)
    servers = {"A": ReferenceServer(a, tp=TP), "B": ReferenceServer(b, tp=TP)}
    digests = {}
    threads = [threading.Thread(target=server.__enter__) for server in servers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, server in servers.items():
        digests[name] = server.live_digests()
        server.__exit__(None, None, None)
    memory = tempfile.mkdtemp(prefix="ckpt-faults-", dir="/dev/shm")
    return World(a=str(a), b=str(b), digests=digests, root=root, memory=memory)
