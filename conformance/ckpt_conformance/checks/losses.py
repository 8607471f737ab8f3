"""Peers that are lost: a controller that never speaks, an agent in the middle of an update."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread
from typing import Any
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.endpoints import endpoint_of
from ckpt_conformance.checks.expect import differs
from ckpt_conformance.checks.interruption import Interruption
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import failure_of, updater_of
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import Level, Tier
from ckpt_core.capability import Capability
from ckpt_core.contract import Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

_DEADLINE_S = 5.0
_SILENCE_S = 1.0
_ATTACHED_S = 10.0


@check(
    "controller_silent",
    tier=Tier.GROUP,
    rule="An attach call whose controller is silent comes back by its own deadline, and the engine is as it was.",
    usual_cause="A deadline of the plugin's own in place of Rendezvous.silence_timeout_s, or none.",
)
def controller_silent(bench: Bench) -> None:
    """Nobody is at the address; then a real update must work."""
    worker = bench.worker_on(1)
    bits, endpoint = bench.bits(worker), endpoint_of(bench, worker)
    rendezvous = Rendezvous(
        address=f"ipc://{bench.store.new_directory('nobody')}/control",
        token="0" * 32,
        update_id="check-silent",
        silence_timeout_s=_SILENCE_S,
        lifetime_s=_ATTACHED_S,
    )
    attached = Thread(target=_attach, args=(bench, endpoint, rendezvous), name="ckpt-check-attach", daemon=True)
    attached.start()
    attached.join(_ATTACHED_S)
    if attached.is_alive():
        raise CheckFailed(
            expected=f"back after a silence of {_SILENCE_S:g} s",
            got=f"not within {_ATTACHED_S:g} s",
            rank=bench.rank(worker),
        )
    bench.expect_bits(worker, bits, "the weights before the attach call")
    with updater_of(bench, [worker]) as updater:
        updater.update(bench.checkpoint(2).path)
    bench.expect_fresh(worker, bench.checkpoint(2))


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
        if not any(differs(old, bench.harness.live(worker)) for worker in workers):
            raise NotOffered("workers that an agent's death meets in the middle: nothing was written")
    _mend(bench, workers)
    for worker in workers:
        bench.expect_fresh(worker, bench.checkpoint(2))
        bench.harness.serve(worker)
        bench.tokens(worker)


def _attach(bench: Bench, endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    with suppress(Exception):  # a refusal will do as well: outcomes travel on the update's socket, where nobody is
        bench.hook.ckpt_attach(endpoint=endpoint, rendezvous=rendezvous)


def _mend(bench: Bench, workers: list[Any]) -> None:
    try:
        with updater_of(bench, workers) as updater:
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
