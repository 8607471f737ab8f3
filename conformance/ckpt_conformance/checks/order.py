"""The order of hooks, and what is refused out of order."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.expect import must_raise, must_refuse
from ckpt_conformance.checks.registry import check
from ckpt_conformance.levels import ModelKind
from ckpt_core.capability import Capability


@check(
    "begin_refused_while_updating",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="ckpt_begin on a worker that is updating raises EngineStateError and changes nothing: the first update goes on.",
    usual_cause="A flag that is set without being looked at, or a reset before the look.",
)
def begin_refused_while_updating(bench: Bench) -> None:
    """In the middle of an update, which must still come out right."""
    undisturbed = bench.bits(bench.worker_on(2))
    worker = bench.worker_on(1)
    first, second = bench.attempt(worker, 2), bench.attempt(worker, 1)
    first.begin()
    for index in range(len(first.batches)):
        if index == len(first.batches) // 2:
            before = bench.bits(worker)
            with must_refuse("a second ckpt_begin", rank=bench.rank(worker)):
                second.begin()
            bench.expect_bits(worker, before, "the weights before the second begin")
        first.load(index)
    first.finish()
    first.commit()
    bench.expect_bits(worker, undisturbed, "an update that nobody disturbed")


@check(
    "begin_refused_while_serving",
    rule="ckpt_begin on a worker that is not paused raises EngineStateError and changes nothing.",
    usual_cause="The plugin trusts that somebody paused the engine.",
)
def begin_refused_while_serving(bench: Bench) -> None:
    """A worker that serves real weights."""
    worker = bench.worker_on(1)
    bench.harness.serve(worker)
    before = bench.bits(worker)
    with must_refuse("ckpt_begin on a serving worker", rank=bench.rank(worker)):
        bench.attempt(worker, 2).begin()
    bench.expect_bits(worker, before, "the weights before begin")


@check(
    "begin_refused_while_asleep",
    needs=(Capability.SLEEP,),
    rule="ckpt_begin on a worker whose weights are asleep raises EngineStateError.",
    usual_cause="Writing into memory that was given back.",
)
def begin_refused_while_asleep(bench: Bench) -> None:
    """Weights dropped."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    bench.harness.sleep(worker)
    with must_refuse("ckpt_begin on a sleeping worker", rank=bench.rank(worker)):
        attempt.begin()


@check(
    "load_refused_outside_update",
    rule="ckpt_load before ckpt_begin, or after ckpt_finish, raises and writes nothing.",
    usual_cause="Loading does not look whether an update runs.",
)
def load_refused_outside_update(bench: Bench) -> None:
    """Both sides of an update."""
    worker = bench.worker_on(1)
    attempt, before = bench.attempt(worker, 2), bench.bits(worker)
    with must_raise("ckpt_load before ckpt_begin", rank=bench.rank(worker)):
        attempt.load(0)
    bench.expect_bits(worker, before, "the weights before the load")
    done = bench.attempt(worker, 1)
    done.run()
    with must_raise("ckpt_load after ckpt_finish", rank=bench.rank(worker)):
        done.load(0)


@check(
    "finish_refused_outside_update",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="ckpt_finish before ckpt_begin, or a second time, raises and changes nothing.",
    usual_cause="Post-processing that runs on whatever is there, and quantises twice.",
)
def finish_refused_outside_update(bench: Bench) -> None:
    """Both sides of an update."""
    worker = bench.worker_on(1)
    before = bench.bits(worker)
    with must_raise("ckpt_finish before ckpt_begin", rank=bench.rank(worker)):
        bench.attempt(worker, 2).finish()
    done = bench.attempt(worker, 1)
    done.run()
    with must_raise("a second ckpt_finish", rank=bench.rank(worker)):
        done.finish()
    bench.expect_bits(worker, before, "the weights before the refused calls")
