"""The guard: no token from weights that are not known to be any one checkpoint."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import Level
from ckpt_core.capability import Capability

_CAUSE = "a check poisons it"


@check(
    "poison_guard",
    level=Level.TRANSACTIONAL,
    needs=(Capability.POISON_GUARD,),
    rule="While ckpt_poison is armed no token is produced, whoever resumes the engine; ckpt_poison(None) disarms it.",
    usual_cause="Only the scheduler is paused, and any client may resume it.",
)
def poison_guard(bench: Bench) -> None:
    """On a worker that serves."""
    worker = bench.worker_on(1)
    bench.harness.serve(worker)
    usual = bench.tokens(worker)
    bench.hook.ckpt_poison(worker=worker, cause=_CAUSE)
    bench.expect_silent(worker, "the guard is armed")
    bench.hook.ckpt_poison(worker=worker, cause=None)
    bench.harness.serve(worker)
    if (tokens := bench.tokens(worker)) != usual:
        raise CheckFailed(expected=f"tokens {usual} again", got=str(tokens), rank=bench.rank(worker))


@check(
    "poison_outlives_update",
    level=Level.TRANSACTIONAL,
    needs=(Capability.POISON_GUARD,),
    rule="Nothing but ckpt_poison(None) disarms the guard: not begin, finish or abort.",
    usual_cause="Finish or resume clears the flag.",
)
def poison_outlives_update(bench: Bench) -> None:
    """An update that finished and is not committed; then one that was aborted at once."""
    worker = bench.worker_on(1)
    bench.hook.ckpt_poison(worker=worker, cause=_CAUSE)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load_all()
    attempt.finish()
    bench.expect_silent(worker, "the guard is armed, and the update is not committed")
    attempt.commit()
    bench.harness.serve(worker)
    bench.tokens(worker)
    other = bench.worker_on(1)
    bench.hook.ckpt_poison(worker=other, cause=_CAUSE)
    aborted = bench.attempt(other, 2)
    aborted.begin()
    aborted.abort()
    bench.expect_silent(other, "the guard is armed, and the update was aborted")
