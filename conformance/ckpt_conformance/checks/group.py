"""Real updates, with agents, rings and a session, into workers in this process."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.expect import spoil
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import failure_of, updater_of
from ckpt_conformance.levels import Level, ModelKind, Tier
from ckpt_core.capability import Capability
from ckpt_core.config import VerifyLevel
from ckpt_core.errors import Outcome, UpdateAborted


@check(
    "update_end_to_end",
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED, ModelKind.DRAFT),
    rule="After a real update of two instances both have the weights and the tokens of a fresh start, and serve again.",
    usual_cause="The attach call enters the loop with another worker than the one that serves.",
)
def update_end_to_end(bench: Bench) -> None:
    """To one checkpoint and on to another; each worker answered the prompt before."""
    workers = [bench.worker(), bench.worker()]
    with updater_of(bench, workers) as updater:
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
    with updater_of(bench, [worker]) as updater:
        error = failure_of(updater, lacking.path)
    if isinstance(error, UpdateAborted) and error.outcome is not Outcome.CLEAN:
        raise CheckFailed(expected="outcome clean", got=error.outcome.value, tensor=absent, rank=bench.rank(worker))
    if absent not in str(error):
        raise CheckFailed(expected="an error that names the tensor", got=str(error), tensor=absent)
    bench.expect_bits(worker, bits, "the weights before the refused update")
    bench.harness.serve(worker)
    bench.tokens(worker)


@check(
    "replay_is_a_load",
    level=Level.SHARDED,
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.TIED, ModelKind.EXPERTS, ModelKind.QUANTISED),
    needs=(Capability.RECORDED_LAYOUT,),
    rule="Once the engine's loader is recorded, updates by recorded copies leave exactly what the loader leaves.",
    usual_cause="Parameters are changed after loading in a way that ckpt_recording_target does not exclude.",
)
def replay_is_a_load(bench: Bench) -> None:
    """Whole tensors in parts, then slices; each update to another checkpoint. What is not replayed is loaded."""
    worker = bench.worker()
    with updater_of(bench, [worker]) as updater:
        for seed in (1, 2, 1):
            report = updater.update(bench.checkpoint(seed).path, version=f"v{seed}")
            bench.expect_fresh(worker, bench.checkpoint(seed))
    with updater_of(bench, [worker], verify=VerifyLevel.NONE) as updater:
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


@check(
    "tensor_larger_than_slot",
    level=Level.SHARDED,
    tier=Tier.GROUP,
    kinds=(ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.ODD_SIZES, ModelKind.SCALARS),
    rule="Tensors that are larger than a bucket land like any other: whole in a larger one, or cut where that is declared.",
    usual_cause="LayoutEntry.cut set by a plugin that does not look at LoadTensor.box.",
)
def tensor_larger_than_slot(bench: Bench) -> None:
    """Buckets of 2 KiB; by the loader, and by recorded copies where there are any."""
    worker = bench.worker()
    with updater_of(bench, [worker], ring_bytes=1 << 13, bucket_bytes=1 << 11) as updater:
        for seed in (1, 2, 1):
            spoil(bench.harness.live(worker))
            updater.update(bench.checkpoint(seed).path, version=f"v{seed}")
            bench.expect_fresh(worker, bench.checkpoint(seed))
