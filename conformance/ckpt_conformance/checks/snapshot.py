"""The old weights back, bit by bit."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import Level, ModelKind
from ckpt_core.capability import Capability


@check(
    "snapshot_exact",
    level=Level.TRANSACTIONAL,
    kinds=(ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.QUANTISED),
    needs=(Capability.SNAPSHOT,),
    rule="A snapshot restored after an abort gives every bit back, into the same storage.",
    usual_cause="A snapshot of views of the live weights, or of parameters without buffers.",
)
def snapshot_exact(bench: Bench) -> None:
    """Aborted in the middle, and after finish."""
    worker = bench.worker_on(1)
    bits = bench.bits(worker)
    for whole in (False, True):
        attempt = bench.attempt(worker, 2)
        snapshot = bench.hook.ckpt_snapshot(worker=worker, update=attempt.update)
        attempt.begin()
        for index in range(len(attempt.batches) if whole else len(attempt.batches) // 2):
            attempt.load(index)
        if whole:
            attempt.finish()
        attempt.abort()
        addresses = bench.addresses(worker)
        bench.hook.ckpt_restore(worker=worker, update=attempt.update, snapshot=snapshot)
        bench.expect_bits(worker, bits, "the weights before the update")
        if bench.addresses(worker) != addresses:
            raise CheckFailed(expected="the addresses before the restore", got="others", rank=bench.rank(worker))
