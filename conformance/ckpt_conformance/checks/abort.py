"""Abort, in any state, any number of times, honest about what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.attempt import Attempt
from ckpt_conformance.checks.expect import differs, must_raise
from ckpt_conformance.checks.failure import InjectedFault, exploding_bucket
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import Level, ModelKind
from ckpt_core.capability import Capability
from ckpt_core.contract import AbortOutcome

Stop: TypeAlias = "Callable[[Bench, Any], tuple[str, Attempt]]"
_KINDS = (ModelKind.PLAIN, ModelKind.QUANTISED)
_SEVERITY = (AbortOutcome.UNTOUCHED, AbortOutcome.RELOADABLE, AbortOutcome.POISONED)


@check(
    "abort_before_load",
    level=Level.TRANSACTIONAL,
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
    level=Level.TRANSACTIONAL,
    kinds=_KINDS,
    rule="Abort returns UNTOUCHED only where no live weight was written; else RELOADABLE or POISONED.",
    usual_cause="A fixed answer, or a flag that is set only at finish.",
)
def abort_honest(bench: Bench) -> None:
    """After each number of buckets, in a failed load or finish, and after a finish without commit."""
    before = bench.bits(bench.worker_on(1))
    for stop in _stops(bench):
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
    level=Level.TRANSACTIONAL,
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
    "nothing_after_abort",
    level=Level.TRANSACTIONAL,
    kinds=_KINDS,
    rule="After its abort an update is over: ckpt_load and ckpt_finish of it raise and write nothing.",
    usual_cause="Buckets that are still under way are taken for those of a running update.",
)
def nothing_after_abort(bench: Bench) -> None:
    """In the middle."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)
    attempt.abort()
    before = bench.bits(worker)
    with must_raise("ckpt_load of an aborted update", rank=bench.rank(worker)):
        attempt.load(1)
    with must_raise("ckpt_finish of an aborted update", rank=bench.rank(worker)):
        attempt.finish()
    bench.expect_bits(worker, before, "the weights after the abort")


@check(
    "update_after_abort",
    level=Level.TRANSACTIONAL,
    kinds=_KINDS,
    needs=(Capability.RELOADABLE_ABORT,),
    rule="After an abort in any state ckpt_begin works, and the next update is right.",
    usual_cause="The updating flag sticks, or half-loaded state goes into the next update.",
)
def update_after_abort(bench: Bench) -> None:
    """After each number of buckets, in a failed load or finish, and after a finish without commit."""
    usual = bench.bits(bench.worker_on(1))
    worker = bench.worker_on(1)
    for stop in _stops(bench):
        where, attempt = stop(bench, worker)
        if (outcome := attempt.abort()) is AbortOutcome.POISONED:
            raise CheckFailed(expected=f"RELOADABLE {where}, as claimed", got=str(outcome), rank=bench.rank(worker))
        bench.update(worker, 1)
        bench.expect_bits(worker, usual, f"an update without an abort {where}")


def _stops(bench: Bench) -> list[Stop]:
    """Every place where an update can end, each as a function that brings one there."""
    buckets = len(bench.attempt(bench.worker(), 2).batches)
    return [*(partial(_loaded, loads=loads) for loads in range(buckets + 1)), _in_load, _in_finish, _after_finish]


def _loaded(bench: Bench, worker: Any, loads: int) -> tuple[str, Attempt]:
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    for index in range(loads):
        attempt.load(index)
    return f"after {loads} of {len(attempt.batches)} buckets", attempt


def _in_load(bench: Bench, worker: Any) -> tuple[str, Attempt]:
    _, attempt = _loaded(bench, worker, 1)
    with suppress(Exception):  # it fails, as it should; that it says so is another check
        attempt.load_bucket(exploding_bucket(bench, worker, attempt))
    return "in ckpt_load", attempt


def _in_finish(bench: Bench, worker: Any) -> tuple[str, Attempt]:
    where, attempt = _all_loaded(bench, worker)
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
    _, attempt = _all_loaded(bench, worker)
    attempt.finish()
    return "after finish, before commit", attempt


def _all_loaded(bench: Bench, worker: Any) -> tuple[str, Attempt]:
    return _loaded(bench, worker, len(bench.attempt(worker, 2).batches))
