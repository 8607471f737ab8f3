"""Peers that are lost in the middle of an update, when ranks have begun and wait for the rest."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.expect import differs
from ckpt_conformance.checks.interruption import Interruption
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import failure_of, updater_of
from ckpt_conformance.levels import Level, Tier
from ckpt_core.api import Updater
from ckpt_core.capability import Capability
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

_DEADLINE_S = 5.0


@check(
    "peer_lost",
    level=Level.TRANSACTIONAL,
    tier=Tier.GROUP,
    needs=(Capability.POISON_GUARD, Capability.RELOADABLE_ABORT),
    rule="When a peer dies in the middle every rank leaves the update at once, and says what it holds; a new update mends it.",
    usual_cause="An abort that waits for somebody, or that calls weights untouched which are mixed.",
)
def peer_lost(bench: Bench) -> None:
    """One of the agents of two workers is killed once something was loaded."""
    workers = [bench.worker_on(1), bench.worker_on(1)]
    old = bench.bits(workers[0])
    interruption = Interruption()
    options = {"ring_bytes": 1 << 16, "bucket_bytes": 1 << 14, "commit_timeout_s": _DEADLINE_S}
    with (
        patch("ckpt_core.session._UNDO_TIMEOUT_S", _DEADLINE_S),  # of the ranks' last words
        updater_of(bench, workers, on_progress=interruption.on_progress, **options) as updater,
    ):
        with interruption.of(updater):
            error = failure_of(updater, bench.checkpoint(2).path)
        _expect_honest(bench, error, workers, old)
        _mend(bench, updater)
    for worker in workers:
        bench.expect_fresh(worker, bench.checkpoint(2))
        bench.harness.serve(worker)
        bench.tokens(worker)


def _mend(bench: Bench, updater: Updater) -> None:
    try:
        updater.update(bench.checkpoint(2).path)
    except CkptError as error:
        raise CheckFailed(expected="a new update mends what a lost peer left", got=str(error)) from error


def _expect_honest(bench: Bench, error: CkptError, workers: list[Any], old: dict[str, Any]) -> None:
    outcome = error.outcome if isinstance(error, UpdateAborted) else None
    if outcome not in (Outcome.CLEAN, Outcome.POISONED):
        raise CheckFailed(expected="outcome clean or poisoned", got=f"{outcome}: {error}")
    for worker in workers:
        if differs(old, bench.harness.live(worker)):
            if outcome is Outcome.CLEAN:
                raise CheckFailed(
                    expected="outcome poisoned: weights were written", got="clean", rank=bench.rank(worker)
                )
            bench.expect_silent(worker, "a peer was lost half-way")
