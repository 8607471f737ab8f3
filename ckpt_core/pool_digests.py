"""Digests of what is in the host pool, by several threads, while somebody looks whether they are still wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np

from ckpt_core.leaf_digest import run_digest
from ckpt_core.manifest import Manifest
from ckpt_core.plan_parts import part_bytes
from ckpt_core.staging import HostPool
from ckpt_core.wire import PartOf

_MOST_THREADS = 8
_CHECK_EVERY_S = 0.1
Value = TypeVar("Value")
Told = Callable[[int], None]


class PoolDigests:
    """See the module.

    Args:
        share: of the machine's cores: one of that many agents.
        told: called now and then with the bytes done so far; raises to end the work.
    """

    def __init__(self, pool: HostPool, *, share: int, told: Told) -> None:
        self._pool = pool
        self._threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // (2 * share)))
        self._told = told

    def of_tensors(self, names: Sequence[str], sizes_bytes: Sequence[int]) -> dict[str, str]:
        """Content digests by name."""
        calls = [lambda name=name: self._pool.digest(name) for name in names]
        return dict(zip(names, self._each(calls, sizes_bytes), strict=True))

    def of_parts(self, manifest: Manifest, parts: Sequence[PartOf]) -> bytes:
        """`run_digest` of each, little-endian."""
        names = [manifest.tensors[part.tensor].name for part in parts]
        sizes = [part_bytes(manifest, part) for part in parts]
        calls = [
            lambda name=name, box=part.box: run_digest(self._pool.packed(name, box))
            for name, part in zip(names, parts, strict=True)
        ]
        return np.array(self._each(calls, sizes), dtype="<u8").tobytes()

    def _each(self, calls: Sequence[Callable[[], Value]], sizes_bytes: Sequence[int]) -> list[Value]:
        if self._threads == 1:
            return self._one_by_one(calls, sizes_bytes)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-digest") as threads:
            futures = [threads.submit(call) for call in calls]
            try:
                self._watch(futures, sizes_bytes)
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
            return [future.result() for future in futures]

    def _one_by_one(self, calls: Sequence[Callable[[], Value]], sizes_bytes: Sequence[int]) -> list[Value]:
        found, done, told = [], 0, time.perf_counter()
        for call, size in zip(calls, sizes_bytes, strict=True):
            found.append(call())
            done += size
            if time.perf_counter() - told > _CHECK_EVERY_S:
                told = time.perf_counter()
                self._told(done)
        return found

    def _watch(self, futures: Sequence[Future[Value]], sizes_bytes: Sequence[int]) -> None:
        while wait(futures, timeout=_CHECK_EVERY_S).not_done:
            self._told(sum(size for future, size in zip(futures, sizes_bytes, strict=True) if future.done()))
