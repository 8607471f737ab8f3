"""The control side: pause, resume, flush, sleep and wake, through the hooks that take an endpoint."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.endpoints import endpoint_of, expect_state
from ckpt_conformance.checks.expect import must_raise
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_core.capability import Capability
from ckpt_core.contract import EndpointState, PauseMode


def _register_pause(capability: Capability, mode: PauseMode) -> None:
    @check(
        f"pause_{mode.value}",
        needs=(capability,),
        rule=f"After ckpt_pause with mode {mode.value} no token is produced until ckpt_resume, and ckpt_ready says so.",
        usual_cause="The pause returns before the last step is over, or the state is not told.",
    )
    def pause(bench: Bench) -> None:
        worker = bench.worker_on(1)
        bench.harness.serve(worker)
        usual = bench.tokens(worker)
        endpoint = endpoint_of(bench, worker)
        bench.hook.ckpt_pause(endpoint=endpoint, mode=mode)
        expect_state(bench, endpoint, EndpointState.PAUSED)
        with must_raise("generating while paused", rank=bench.rank(worker)):
            bench.tokens(worker)
        bench.hook.ckpt_resume(endpoint=endpoint, version=None)
        expect_state(bench, endpoint, EndpointState.SERVING)
        if (tokens := bench.tokens(worker)) != usual:
            raise CheckFailed(expected=f"tokens {usual} again", got=str(tokens), rank=bench.rank(worker))


for _capability, _mode in (
    (Capability.PAUSE_ABORT, PauseMode.ABORT),
    (Capability.PAUSE_WAIT, PauseMode.WAIT),
    (Capability.PAUSE_KEEP, PauseMode.KEEP),
    (Capability.PAUSE_RETRACT, PauseMode.RETRACT),
):
    _register_pause(_capability, _mode)


@check(
    "flush_cache",
    needs=(Capability.FLUSH_CACHE,),
    rule="After ckpt_flush_cache nothing is reused that the old weights computed: tokens are those of a fresh start.",
    usual_cause="Only the KV cache of requests is dropped, and not the prefix cache; or the flush fails in silence.",
)
def flush_cache(bench: Bench) -> None:
    """The same prompt before and after the update, so that a prefix cache would answer."""
    worker = bench.worker_on(1)
    endpoint = endpoint_of(bench, worker)
    bench.harness.serve(worker)
    bench.tokens(worker)
    bench.hook.ckpt_pause(endpoint=endpoint, mode=PauseMode.WAIT)
    bench.update(worker, 2)
    bench.hook.ckpt_flush_cache(endpoint=endpoint)
    bench.hook.ckpt_resume(endpoint=endpoint, version="two")
    expected, got = bench.tokens(bench.fresh(bench.checkpoint(2))), bench.tokens(worker)
    if got != expected:
        raise CheckFailed(expected=f"a fresh start's tokens {expected}", got=str(got), rank=bench.rank(worker))


@check(
    "sleep_and_wake",
    needs=(Capability.SLEEP,),
    rule="After sleep and ckpt_wake no token is produced before an update; after it the weights are those of a fresh start.",
    usual_cause="Weights come back without contents and serve, or loaders are lost with the memory.",
)
def sleep_and_wake(bench: Bench) -> None:
    """Weights dropped and allocated again."""
    worker = bench.worker_on(1)
    endpoint = endpoint_of(bench, worker)
    bench.harness.sleep(worker)
    expect_state(bench, endpoint, EndpointState.ASLEEP)
    bench.hook.ckpt_wake(endpoint=endpoint, tags=("weights", "kv_cache"))
    bench.expect_silent(worker, "the weights have no contents")
    bench.hook.ckpt_pause(endpoint=endpoint, mode=PauseMode.ABORT)
    bench.update(worker, 2)
    bench.expect_fresh(worker, bench.checkpoint(2))
    bench.harness.serve(worker)
    bench.tokens(worker)


@check(
    "initial_weights",
    needs=(Capability.INITIAL_WEIGHTS,),
    rule="An engine started to wait for weights produces no token before its first commit, and serves after it.",
    usual_cause="Dummy weights that serve.",
)
def initial_weights(bench: Bench) -> None:
    """A worker that was started without weights."""
    worker = bench.keep(bench.harness.waiting_worker(bench.checkpoint(1).path, bench.kind))
    bench.expect_silent(worker, "no weights have been committed")
    attempt = bench.attempt(worker, 1)
    attempt.begin()
    attempt.load_all()
    attempt.finish()
    bench.expect_silent(worker, "the weights are not committed")
    attempt.commit()
    bench.harness.serve(worker)
    bench.tokens(worker)
