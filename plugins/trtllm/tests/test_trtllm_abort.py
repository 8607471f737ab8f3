"""Abort: on every rank, again and again, and what the engine must be told."""

from types import SimpleNamespace

import pytest

from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import AbortOutcome, Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError
from ckpt_trtllm import control
from ckpt_trtllm.handles import Handle

RENDEZVOUS = Rendezvous(address="ipc:///x", token="secret", update_id="u", silence_timeout_s=1.0)  # noqa: S106
COMMITTED = {"error": "", "outcome": "committed", "cause": ""}
POISONED = {"error": "", "outcome": "poisoned", "cause": "a bucket did not come"}


class Ranks(Handle):
    """Answers by method; remembers what was asked."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def rpc(self, method, args, timeout_s):
        self.asked.append((method, *args))
        return self.answers[method]

    def abort_requests(self, timeout_s):
        return False

    def admit_requests(self, timeout_s):
        self.asked.append(("admit",))


def endpoint(handle):
    return Endpoint(url="x", engine="trtllm", handle=handle)


def test_no_rank_is_told_where_all_committed():
    ranks = Ranks(ckpt_attach=[COMMITTED, COMMITTED])
    control.attach(endpoint(ranks), RENDEZVOUS)
    assert [call[0] for call in ranks.asked] == ["ckpt_attach"]


@pytest.mark.parametrize("place", [0, 1])
def test_every_rank_is_told_where_one_failed(place):
    results = [COMMITTED, COMMITTED]
    results[place] = POISONED
    ranks = Ranks(ckpt_attach=results, ckpt_abort=[{"error": ""}] * 2)
    control.attach(endpoint(ranks), RENDEZVOUS)
    assert ranks.asked[-1] == ("ckpt_abort", "a bucket did not come")


def test_nobody_is_told_of_an_update_that_was_refused():
    """The reason may be an update of the engine's own, which that would end."""
    refused = {"error": "", "outcome": "untouched", "cause": "TensorRT-LLM's own update_weights is open"}
    ranks = Ranks(ckpt_attach=[refused, refused])
    control.attach(endpoint(ranks), RENDEZVOUS)
    assert [call[0] for call in ranks.asked] == ["ckpt_attach"]


def test_all_are_told_where_a_rank_could_not_be_entered():
    broken = {"error": "ImportError"}
    ranks = Ranks(ckpt_attach=[{**POISONED, "outcome": "untouched"}, broken], ckpt_abort=[{"error": ""}] * 2)
    with pytest.raises(EngineError, match="attach failed on rank 1: ImportError"):
        control.attach(endpoint(ranks), RENDEZVOUS)
    assert ranks.asked[-1] == ("ckpt_abort", "a bucket did not come")


def test_a_rank_that_cannot_be_told_is_named():
    ranks = Ranks(ckpt_attach=[COMMITTED, POISONED], ckpt_abort=[{"error": ""}, {"error": "gone"}])
    with pytest.raises(EngineError, match="abort failed on rank 1: gone"):
        control.attach(endpoint(ranks), RENDEZVOUS)


def test_the_worker_and_the_loader_are_told(bench, monkeypatch):
    worker = bench.worker_on(1)
    told = []
    loader = worker.worker.engine.model_engine.model_loader
    monkeypatch.setattr(worker.worker, "abort_update_weights", told.append)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    gate = next(item for batch in attempt.batches for item in batch if item[0].endswith("gate_proj.weight"))
    attempt.load_bucket(attempt.deliver([gate]).bucket)
    assert loader.weight_mapper.pending
    assert attempt.abort("a reason") is AbortOutcome.RELOADABLE
    assert told == ["a reason"]
    assert not loader.weight_mapper.pending


def test_it_says_the_same_again_and_tells_nobody_twice(bench, monkeypatch):
    worker = bench.worker_on(1)
    told = []
    monkeypatch.setattr(worker.worker, "abort_update_weights", told.append)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)
    assert [attempt.abort(), attempt.abort(), attempt.abort()] == [AbortOutcome.RELOADABLE] * 3
    assert len(told) == 1


def test_an_abort_of_another_update_leaves_this_one_alone(bench):
    worker = bench.worker_on(1)
    attempt, other = bench.attempt(worker, 2), bench.attempt(worker, 1)
    attempt.begin()
    attempt.load(0)
    assert other.abort() is AbortOutcome.UNTOUCHED
    assert worker.worker.ckpt_abort("another rank failed") == {"error": ""}
    for index in range(1, len(attempt.batches)):
        attempt.load(index)
    attempt.finish()
    attempt.commit()
    bench.expect_fresh(worker, bench.checkpoint(2))


def test_an_abort_that_the_engine_fails_comes_out(bench, monkeypatch):
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)

    def abort_update_weights(reason):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(worker.worker, "abort_update_weights", abort_update_weights)
    with pytest.raises(RuntimeError, match="the device is gone"):
        attempt.abort()
    assert worker.guard.reason


def test_addresses_are_those_of_before_after_an_abort_and_another_update(bench_of):
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker_on(1)
    before = bench.addresses(worker)
    for _ in range(2):
        attempt = bench.attempt(worker, 2)
        attempt.begin()
        attempt.load(0)
        attempt.abort()
    assert bench.addresses(worker) != before
    bench.update(worker, 2)
    assert bench.addresses(worker) == before
    bench.expect_fresh(worker, bench.checkpoint(2))


def test_a_module_that_comes_out_in_another_shape_is_named(bench_of, monkeypatch):
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load_all()
    path, layer = next(item for item in worker.model.named_modules() if item[0].endswith("qkv_proj"))
    whole = layer.process_weights_after_loading

    def process():
        whole()
        layer._buffers["weight_scale"] = layer._buffers["weight_scale"].flatten()

    monkeypatch.setattr(layer, "process_weights_after_loading", process)
    with pytest.raises(EngineError, match=rf"{path}\.weight_scale.*restart"):
        attempt.finish()
    assert SimpleNamespace(outcome=attempt.abort()).outcome is AbortOutcome.RELOADABLE
