"""Old or new, over all engines of an update, and never anything else that serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeAlias
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.endpoints import endpoint_of
from ckpt_conformance.checks.failure import InjectedFault
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import failure_of, updater_of
from ckpt_conformance.levels import Level, ModelKind, Tier
from ckpt_core import going_back, wire
from ckpt_core.capability import Capability
from ckpt_core.channel import Line
from ckpt_core.config import Undo
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

Faulty: TypeAlias = "Callable[[Bench, Any], AbstractContextManager[None]]"
_FAULT = "injected into the engine's post-processing"
_THROUGH_S = 10.0


@check(
    "failed_update_is_silent",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    needs=(Capability.POISON_GUARD, Capability.RELOADABLE_ABORT),
    rule="An update that fails after weights were written ends as POISONED, no token is produced, and a new update mends it.",
    usual_cause="The failure is swallowed in the engine, or its resume route does not ask the guard.",
)
def failed_update_is_silent(bench: Bench) -> None:
    """The engine's post-processing fails once."""
    worker = bench.worker_on(1)
    with updater_of(bench, [worker]) as updater:
        with _fault(bench, worker):
            error = failure_of(updater, bench.checkpoint(2).path)
        _expect_outcome(error, Outcome.POISONED, bench, worker)
        bench.expect_silent(worker, "the update failed half-way")
        updater.update(bench.checkpoint(2).path)
    bench.expect_fresh(worker, bench.checkpoint(2))
    bench.harness.serve(worker)
    bench.tokens(worker)


@check(
    "all_or_none",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    needs=(Capability.POISON_GUARD, Capability.RELOADABLE_ABORT),
    rule="Where one engine of an update fails none serves the new weights, also where it had finished; a new update mends all.",
    usual_cause="Weights that are whole are taken for committed: the guard, or an abort, is ignored after finish.",
)
def all_or_none(bench: Bench) -> None:
    """The post-processing of one of two fails."""
    failing, other = bench.worker_on(1), bench.worker_on(1)
    with updater_of(bench, [failing, other]) as updater:
        with _fault(bench, failing), _through_together(2):
            error = failure_of(updater, bench.checkpoint(2).path)
        _expect_outcome(error, Outcome.POISONED, bench, failing)
        for worker in (failing, other):
            bench.expect_silent(worker, "the update failed on one of two engines")
        updater.update(bench.checkpoint(2).path)
    for worker in (failing, other):
        bench.expect_fresh(worker, bench.checkpoint(2))
        bench.harness.serve(worker)
        bench.tokens(worker)


@check(
    "undone_by_replay",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    needs=(Capability.RELOADABLE_ABORT,),
    rule="With the old version warm a failed update ends as RESTORED: every bit, the tokens and the version are the old ones.",
    usual_cause="State of the failed update that goes into the one that undoes it.",
)
def undone_by_replay(bench: Bench) -> None:
    """The engine's post-processing fails once."""
    _expect_undone(bench, Undo.REPLAY, _fault_until_undone)


@check(
    "undone_by_snapshot",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    needs=(Capability.SNAPSHOT,),
    rule="With a snapshot a failed update ends as RESTORED: every bit, the tokens and the version are the old ones.",
    usual_cause="A snapshot without buffers, or a restore that leaves the engine's own mark of mixed weights.",
)
def undone_by_snapshot(bench: Bench) -> None:
    """The engine's post-processing fails as long as anybody calls it, so that no update could mend anything."""
    _expect_undone(bench, Undo.SNAPSHOT, _fault)


@check(
    "rollback",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="A rollback brings the version before back: every bit, the tokens and the version.",
    usual_cause="A version that was there before is taken for still being there.",
)
def rollback(bench: Bench) -> None:
    """A, B, and back."""
    worker = bench.worker()
    with updater_of(bench, [worker]) as updater:
        for seed, version in ((1, "old"), (2, "new")):
            updater.update(bench.checkpoint(seed).path, version=version)
        updater.rollback()
    _expect_old(bench, worker)


def _expect_undone(bench: Bench, undo: Undo, faulty: Faulty) -> None:
    worker = bench.worker()
    with updater_of(bench, [worker], undo=undo) as updater:
        updater.update(bench.checkpoint(1).path, version="old")
        with faulty(bench, worker):
            error = failure_of(updater, bench.checkpoint(2).path, version="new")
    _expect_outcome(error, Outcome.RESTORED, bench, worker)
    _expect_old(bench, worker)


def _fault(bench: Bench, worker: Any) -> AbstractContextManager[None]:
    """The engine's post-processing fails."""
    return bench.harness.failing_finish(worker, InjectedFault(_FAULT))


@contextmanager
def _through_together(count: int) -> Iterator[None]:
    """No rank says that it is through, well or not, before all are: those that are well have finished then."""
    send, all_through = Line.send, Barrier(count)

    def send_together(line: Line, body: wire.AnyMessage) -> None:
        if isinstance(body, (wire.Verified, wire.Failure)):
            with suppress(BrokenBarrierError):
                all_through.wait(_THROUGH_S)
        send(line, body)

    with patch.object(Line, "send", send_together):
        yield


@contextmanager
def _fault_until_undone(bench: Bench, worker: Any) -> Iterator[None]:
    """The engine's post-processing fails, until the core begins to go back to the version before."""
    with ExitStack() as fault:
        fault.enter_context(_fault(bench, worker))

        def go_back(*arguments: Any) -> UpdateAborted:
            fault.close()
            return going_back.go_back(*arguments)

        with patch("ckpt_core.api.go_back", go_back):
            yield


def _expect_old(bench: Bench, worker: Any) -> None:
    """The version first: engines with globals tell that of the worker that was started last."""
    if bench.plugin.info.support(Capability.LIVE_VERSION).usable:
        version = bench.hook.ckpt_ready(endpoint=endpoint_of(bench, worker)).version
        if version != "old":
            raise CheckFailed(expected="version 'old'", got=repr(version), rank=bench.rank(worker))
    fresh = bench.fresh(bench.checkpoint(1))
    bench.expect_bits(worker, bench.harness.live(fresh), "the old version")
    bench.harness.serve(worker)
    expected, got = bench.tokens(fresh), bench.tokens(worker)
    if got != expected:
        raise CheckFailed(expected=f"the old version's tokens {expected}", got=str(got), rank=bench.rank(worker))


def _expect_outcome(error: CkptError, outcome: Outcome, bench: Bench, worker: Any) -> None:
    got = error.outcome if isinstance(error, UpdateAborted) else None
    if got is not outcome:
        raise CheckFailed(
            expected=f"outcome {outcome.value}",
            got=f"{got.value if got else type(error).__name__}: {error}",
            rank=bench.rank(worker),
        )
