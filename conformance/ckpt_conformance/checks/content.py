"""After an update the live weights are those of a fresh start, bit by bit; before it they are filled with nonsense."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.expect import differs
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import Level, ModelKind
from ckpt_core.capability import Capability

_RULE = "After an update the live weights equal those of a fresh start on the same checkpoint, bit by bit"


def _equals_fresh(bench: Bench) -> None:
    worker = bench.worker()
    bench.update(worker, 1)
    bench.expect_fresh(worker, bench.checkpoint(1))


check(
    "live_equals_fresh",
    rule=f"{_RULE}.",
    usual_cause="A tensor that is skipped, or lands in the wrong part of a fused parameter.",
)(_equals_fresh)
check(
    "tied_weights",
    kinds=(ModelKind.TIED,),
    needs=(Capability.TIED_WEIGHTS,),
    rule=f"{_RULE}, with a head that is tied to the embedding.",
    usual_cause="A copy of the embedding in the head, which only loading at start makes.",
)(_equals_fresh)
check(
    "packed_experts",
    kinds=(ModelKind.EXPERTS,),
    rule=f"{_RULE}, with experts packed into one parameter.",
    usual_cause="Expert or gate and up order, or blocks that a kernel has swapped in place.",
)(_equals_fresh)
check(
    "quantised_weights",
    kinds=(ModelKind.QUANTISED,),
    needs=(Capability.QUANTIZED,),
    rule=f"{_RULE}, where the engine quantises after loading.",
    usual_cause="Scales of the old weights, or post-processing that ran only at start.",
)(_equals_fresh)
check(
    "odd_sizes",
    kinds=(ModelKind.ODD_SIZES,),
    rule=f"{_RULE}, with sizes that are no multiples of anything.",
    usual_cause="Padding that keeps old values, or sizes rounded down.",
)(_equals_fresh)
check(
    "draft_model",
    kinds=(ModelKind.DRAFT,),
    needs=(Capability.DRAFT_MODEL,),
    rule=f"{_RULE}, with a draft model that is loaded in the same step.",
    usual_cause="Only the target's loader is called, and the draft model goes on guessing by the old weights.",
)(_equals_fresh)
check(
    "scalar_and_empty",
    kinds=(ModelKind.SCALARS,),
    rule=f"{_RULE}, with a tensor without dimensions and one without elements.",
    usual_cause="`tensor[0]` or `if tensor.numel()` in a loader.",
)(_equals_fresh)
check(
    "sharded_slices",
    level=Level.SHARDED,
    kinds=(ModelKind.SHARDED,),
    rule=f"{_RULE}, on a rank that holds other slices than the first.",
    usual_cause="The first rank's slice taken, or heads counted wrongly where they are replicated.",
)(_equals_fresh)


@check(
    "second_update_same",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="A second update to the same checkpoint gives the same result as the first.",
    usual_cause="State of loading that the first update uses up: loaders, flags, full-precision parameters.",
)
def second_update_same(bench: Bench) -> None:
    """On one worker."""
    worker = bench.worker_on(1)
    first = bench.bits(worker)
    bench.update(worker, 1)
    bench.expect_bits(worker, first, "the first update")


@check(
    "there_and_back",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="Updates to A, to B and to A again leave the bits of A; and B's are others.",
    usual_cause="A cache by name, or values accumulated over the old ones.",
)
def there_and_back(bench: Bench) -> None:
    """On one worker."""
    worker = bench.worker_on(1)
    first = bench.bits(worker)
    bench.update(worker, 2)
    if not differs(first, bench.harness.live(worker)):
        raise CheckFailed(expected="other weights after an update to another checkpoint", got="the same")
    bench.update(worker, 1)
    bench.expect_bits(worker, first, "the first update to this checkpoint")
