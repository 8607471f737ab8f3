"""Nothing hidden: hooks start no threads that outlive them, and wait for no other rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch.distributed

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import ModelKind

_KINDS = (ModelKind.PLAIN, ModelKind.QUANTISED)
_GRACE_S = 0.5
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@check(
    "no_hidden_threads",
    kinds=_KINDS,
    rule="Hooks leave no thread behind: not one more after every update.",
    usual_cause="A loader or a watchdog in a thread of its own, which nobody joins.",
)
def no_hidden_threads(bench: Bench) -> None:
    """Of three updates each starts some: fewer may be a pool that fills up."""
    worker = bench.worker_on(1)
    started = [_started_by(partial(bench.update, worker, seed)) for seed in (2, 1, 2)]
    if all(started):
        raise CheckFailed(
            expected="the threads from before the update", got=f"also {started[-1]}", rank=bench.rank(worker)
        )


@check(
    "no_hidden_collectives",
    kinds=_KINDS,
    rule="No hook calls a collective, not even in abort: a rank may be dead, and the others must not wait for it.",
    usual_cause="A barrier after loading, or an all_reduce of a success flag.",
)
def no_hidden_collectives(bench: Bench) -> None:
    """An update that is aborted, and one that is not, under torch.distributed functions that tell on their callers."""
    worker, other = bench.worker_on(1), bench.worker_on(1)
    with _calls_noted() as called:
        aborted = bench.attempt(other, 2)
        aborted.begin()
        aborted.load(0)
        aborted.abort()
        bench.update(worker, 2)
    if called:
        raise CheckFailed(expected="no collective", got=f"torch.distributed.{called[0]}", rank=bench.rank(worker))


def _started_by(call: Callable[[], None]) -> list[str]:
    """Names of threads that a call leaves behind, after a grace for those that are ending."""
    before = set(threading.enumerate())
    call()
    deadline = time.monotonic() + _GRACE_S
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        next(iter(left)).join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in left)


@contextmanager
def _calls_noted() -> Iterator[list[str]]:
    """Names of the functions of torch.distributed that were called meanwhile; they do what they always do."""
    called: list[str] = []
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            original = getattr(torch.distributed, name)
            stack.enter_context(patch.object(torch.distributed, name, _noting(name, original, called)))
        yield called


def _noting(name: str, original: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        called.append(name)
        return original(*arguments, **options)

    return noted
