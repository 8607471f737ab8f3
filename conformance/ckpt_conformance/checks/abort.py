"""Abort, in any state, any number of times, honest about what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.attempt import Attempt
from ckpt_conformance.checks.expect import differs
from ckpt_conformance.checks.failure import InjectedFault
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import ModelKind
from ckpt_core.capability import Capability
from ckpt_core.contract import AbortOutcome

_KINDS = (ModelKind.PLAIN, ModelKind.QUANTISED)
_SEVERITY = (AbortOutcome.UNTOUCHED, AbortOutcome.RELOADABLE, AbortOutcome.POISONED)


@check(
    "abort_before_load",
    kinds=_KINDS,
    rule="Abort between ckpt_begin and the first ckpt_load returns UNTOUCHED; every bit and address is as before.",
    usual_cause="Begin frees or replaces what it makes loadable, and abort does not put it back.",
)
def abort_before_load(bench: Bench) -> None:
    """Then a whole update must work."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    bits, addresses = bench.bits(worker), bench.addresses(worker)
    attempt.begin()
    if (outcome := attempt.abort()) is not AbortOutcome.UNTOUCHED:
        raise CheckFailed(expected="UNTOUCHED", got=str(outcome), rank=bench.rank(worker))
    bench.expect_bits(worker, bits, "the weights before begin")
    if bench.addresses(worker) != addresses:
        raise CheckFailed(expected="the addresses before begin", got="others", rank=bench.rank(worker))
    bench.attempt(worker, 2).run()


@check(
    "abort_honest",
    kinds=_KINDS,
    rule="Abort returns UNTOUCHED only where no live weight was written; else RELOADABLE or POISONED.",
    usual_cause="A fixed answer, or a flag that is set only at finish.",
)
def abort_honest(bench: Bench) -> None:
    """After each number of buckets, in a failed finish, and after a finish without commit."""
    before = bench.bits(bench.worker_on(1))
    for stop in _STOPS:
        worker = bench.worker_on(1)
        where, attempt = stop(bench, worker)
        outcome = attempt.abort()
        if not isinstance(outcome, AbortOutcome):
            raise CheckFailed(expected="an AbortOutcome", got=repr(outcome), rank=bench.rank(worker))
        touched = differs(before, bench.harness.live(worker))
        if touched and outcome is AbortOutcome.UNTOUCHED:
            raise CheckFailed(
                expected=f"RELOADABLE or POISONED {where}: live weights were written",
                got="UNTOUCHED",
                rank=bench.rank(worker),
            )


@check(
    "abort_twice",
    kinds=_KINDS,
    rule="A second abort does not raise and says nothing milder than the first; nor does an abort of what never began raise.",
    usual_cause="State that the first abort has cleared.",
)
def abort_twice(bench: Bench) -> None:
    """In the middle; and on an idle worker."""
    worker = bench.worker_on(1)
    bits = bench.bits(worker)
    if (idle := bench.attempt(worker, 2).abort()) is not AbortOutcome.UNTOUCHED:
        raise CheckFailed(expected="UNTOUCHED for an update that never began", got=str(idle), rank=bench.rank(worker))
    bench.expect_bits(worker, bits, "the weights before an abort of nothing")
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)
    first, second = attempt.abort(), attempt.abort()
    if _SEVERITY.index(second) < _SEVERITY.index(first):
        raise CheckFailed(expected=f"{first} or worse", got=str(second), rank=bench.rank(worker))


@check(
    "update_after_abort",
    kinds=_KINDS,
    needs=(Capability.RELOADABLE_ABORT,),
    rule="After an abort in any state ckpt_begin works, and the next update is right.",
    usual_cause="The updating flag sticks, or half-loaded state goes into the next update.",
)
def update_after_abort(bench: Bench) -> None:
    """After each number of buckets, in a failed finish, and after a finish without commit."""
    usual = bench.bits(bench.worker_on(1))
    worker = bench.worker_on(1)
    for stop in _STOPS:
        where, attempt = stop(bench, worker)
        if (outcome := attempt.abort()) is AbortOutcome.POISONED:
            raise CheckFailed(expected=f"RELOADABLE {where}, as claimed", got=str(outcome), rank=bench.rank(worker))
        bench.update(worker, 1)
        bench.expect_bits(worker, usual, f"an update without an abort {where}")


def _loaded(bench: Bench, worker: Any, share: float) -> tuple[str, Attempt]:
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    loads = round(share * len(attempt.batches))
    for index in range(loads):
        attempt.load(index)
    return f"after {loads} of {len(attempt.batches)} buckets", attempt


def _in_finish(bench: Bench, worker: Any) -> tuple[str, Attempt]:
    where, attempt = _loaded(bench, worker, 1)
    error = InjectedFault("injected into the engine's post-processing")
    try:
        with bench.harness.failing_finish(worker, error):
            attempt.finish()
    except NotOffered:
        return where, attempt
    except Exception:  # noqa: BLE001 it failed, as it should
        return "in finish", attempt
    return "after a finish that swallowed an error", attempt


def _after_finish(bench: Bench, worker: Any) -> tuple[str, Attempt]:
    _, attempt = _loaded(bench, worker, 1)
    attempt.finish()
    return "after finish, before commit", attempt


_STOPS: tuple[Callable[[Bench, Any], tuple[str, Attempt]], ...] = (
    partial(_loaded, share=0),
    partial(_loaded, share=0.1),
    partial(_loaded, share=0.5),
    partial(_loaded, share=1),
    _in_finish,
    _after_finish,
)
