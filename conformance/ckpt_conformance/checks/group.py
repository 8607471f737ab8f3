"""Real updates, with agents, rings and a session, into workers in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.expect import spoil
from ckpt_conformance.checks.failure import InjectedFault
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import ModelKind, Tier
from ckpt_core.api import Updater
from ckpt_core.capability import Capability
from ckpt_core.config import Undo, UpdateConfig, VerifyLevel
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

_CONFIG = UpdateConfig(
    ring_bytes=1 << 20,
    bucket_bytes=1 << 16,
    attach_timeout_s=30.0,
    transfer_timeout_s=30.0,
    silence_timeout_s=20.0,
    commit_timeout_s=20.0,
    undo=Undo.NONE,
)


@check(
    "update_end_to_end",
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="After a real update of two instances both have the weights and the tokens of a fresh start, and serve again.",
    usual_cause="The attach call enters the loop with another worker than the one that serves.",
)
def update_end_to_end(bench: Bench) -> None:
    """To one checkpoint and on to another; each worker answered the prompt before."""
    workers = [bench.worker(), bench.worker()]
    with _updater(bench, workers) as updater:
        for seed in (1, 2):
            for worker in workers:
                spoil(bench.harness.live(worker))
            updater.update(bench.checkpoint(seed).path, version=f"v{seed}")
            expected = bench.tokens(bench.fresh(bench.checkpoint(seed)))
            for worker in workers:
                bench.expect_fresh(worker, bench.checkpoint(seed))
                bench.harness.serve(worker)
                if (got := bench.tokens(worker)) != expected:
                    raise CheckFailed(
                        expected=f"a fresh start's tokens {expected}", got=str(got), rank=bench.rank(worker)
                    )


@check(
    "version_told",
    tier=Tier.GROUP,
    needs=(Capability.LIVE_VERSION,),
    rule="After a commit ckpt_ready tells the version that was committed.",
    usual_cause="The version is set where the update begins, or nowhere.",
)
def version_told(bench: Bench) -> None:
    """A label of our own."""
    worker = bench.worker()
    target = bench.harness.target(worker)
    with Updater([target], config=_CONFIG) as updater:
        updater.update(bench.checkpoint(1).path, version="conformance-7")
    endpoint = Endpoint(url=target.url, engine=target.engine, handle=target.handle)
    bench.resources.callback(endpoint.close)
    if (version := bench.hook.ckpt_ready(endpoint=endpoint).version) != "conformance-7":
        raise CheckFailed(expected="version 'conformance-7'", got=repr(version), rank=bench.rank(worker))


@check(
    "misfit_leaves_clean",
    tier=Tier.GROUP,
    rule="A checkpoint that does not fit is refused by name before anything is touched, and the engine serves on.",
    usual_cause="Names are compared only while loading.",
)
def misfit_leaves_clean(bench: Bench) -> None:
    """A tensor is missing."""
    worker = bench.worker_on(1)
    bits, whole = bench.bits(worker), bench.checkpoint(1)
    absent = sorted(whole.tensors)[0]
    lacking = bench.store.variant(whole, {name: t for name, t in whole.tensors.items() if name != absent})
    with _updater(bench, [worker]) as updater:
        error = _failure(updater, lacking.path)
    if isinstance(error, UpdateAborted) and error.outcome is not Outcome.CLEAN:
        raise CheckFailed(expected="outcome clean", got=error.outcome.value, tensor=absent, rank=bench.rank(worker))
    if absent not in str(error):
        raise CheckFailed(expected="an error that names the tensor", got=str(error), tensor=absent)
    bench.expect_bits(worker, bits, "the weights before the refused update")
    bench.harness.serve(worker)
    bench.tokens(worker)


@check(
    "failed_update_is_silent",
    tier=Tier.GROUP,
    needs=(Capability.POISON_GUARD,),
    rule="An update that fails after weights were written ends as POISONED, no token is produced, and a new update mends it.",
    usual_cause="The failure is swallowed in the engine, or its resume route does not ask the guard.",
)
def failed_update_is_silent(bench: Bench) -> None:
    """The engine's post-processing fails once."""
    worker = bench.worker_on(1)
    with _updater(bench, [worker]) as updater:
        with bench.harness.failing_finish(worker, InjectedFault("injected into the engine's post-processing")):
            error = _failure(updater, bench.checkpoint(2).path)
        outcome = error.outcome if isinstance(error, UpdateAborted) else error
        if outcome is not Outcome.POISONED:
            raise CheckFailed(expected="outcome poisoned", got=str(outcome), rank=bench.rank(worker))
        bench.expect_silent(worker, "the update failed half-way")
        updater.update(bench.checkpoint(2).path)
    bench.expect_fresh(worker, bench.checkpoint(2))
    bench.harness.serve(worker)
    bench.tokens(worker)


def _updater(bench: Bench, workers: Sequence[Any]) -> AbstractContextManager[Updater]:
    return Updater([bench.harness.target(worker) for worker in workers], config=_CONFIG)


def _failure(updater: Updater, checkpoint: Any) -> CkptError:
    """The error of an update that must fail."""
    try:
        updater.update(checkpoint)
    except CkptError as error:
        return error
    raise CheckFailed(expected="the update fails", got="it was committed")


@check(
    "replay_is_a_load",
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.TIED, ModelKind.EXPERTS, ModelKind.QUANTISED),
    needs=(Capability.RECORDED_LAYOUT,),
    rule="Once the engine's loader is recorded, updates by recorded copies leave exactly what the loader leaves.",
    usual_cause="Parameters are changed after loading in a way that ckpt_recording_target does not exclude.",
)
def replay_is_a_load(bench: Bench) -> None:
    """Whole tensors in parts, then slices; each update to another checkpoint. What is not replayed is loaded."""
    worker = bench.worker()
    with _updater(bench, [worker]) as updater:
        for seed in (1, 2, 1):
            report = updater.update(bench.checkpoint(seed).path, version=f"v{seed}")
            bench.expect_fresh(worker, bench.checkpoint(seed))
    with Updater([bench.harness.target(worker)], config=replace(_CONFIG, verify=VerifyLevel.NONE)) as updater:
        for seed in (2, 1):
            spoil(bench.harness.live(worker))
            updater.update(bench.checkpoint(seed).path, version=f"v{seed}")
            bench.expect_fresh(worker, bench.checkpoint(seed))
    stats = report.ranks[0].stats
    target = bench.hook.ckpt_recording_target(worker=worker)
    if target is not None and not target.excluded and not stats.replayed_bytes:
        raise CheckFailed(
            expected="recorded copies in the third update", got="all bytes through the loader", rank=bench.rank(worker)
        )
