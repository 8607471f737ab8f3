"""The order of a reload, and that the suite finds out where a step of it is left out."""

from types import SimpleNamespace

import pytest
import torch

from ckpt_conformance.levels import Level, ModelKind
from ckpt_conformance.report import Status
from ckpt_conformance.runner import Runner, select
from ckpt_core.errors import EngineStateError
from ckpt_trtllm import cycle, held
from ckpt_trtllm.landing import Landing, is_above, is_below
from ckpt_trtllm.standin.executor import Executor
from ckpt_trtllm.standin.model import Balancer
from ckpt_trtllm.storage import Storage

FUSED = {"qkv_proj": ("q_proj", "k_proj"), "gate_up_proj": ("gate_proj",)}
PATHS = (
    "",
    "model",
    "model.embed",
    "model.layers.0",
    "model.layers.0.attn",
    "model.layers.0.attn.qkv_proj",
    "mlp.experts",
)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.embed.weight", "model.embed"),
        ("model.layers.0.attn.q_proj.weight", "model.layers.0.attn.qkv_proj"),
        ("model.layers.0.attn.q_proj.weight_scale", "model.layers.0.attn.qkv_proj"),
        ("model.layers.0.attn.o_proj.weight", "model.layers.0.attn"),
        ("mlp.experts.3.gate_proj.weight", "mlp.experts"),
        ("model.layers.7.norm.weight", "model"),
        ("head.weight", ""),
    ],
)
def test_where_a_tensor_lands(name, path):
    assert Landing(PATHS, FUSED).of(name) == path


def test_above_and_below():
    assert is_below("a.b.c", ("a.b",))
    assert not is_below("a.bc", ("a.b",))
    assert is_below("a.b", ("",))
    assert is_above("", ("a",))
    assert is_above("a", ("a.b",))
    assert not is_above("a.b", ("a.b",))


def test_the_balancer_and_the_caches_come_after_the_processing(bench_of, monkeypatch):
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker_on(1)
    calls = []

    def noted(kind, name):
        original = getattr(kind, name)

        def call(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, call)

    first = worker.model.reloadable_layers()[0]
    for name in ("pre_reload_weights", "process_weights_after_loading", "post_load_weights"):
        noted(type(first), name)
    noted(type(worker.worker.engine.model_engine.model_loader), "reload")
    noted(Balancer, "register_weight_slots_after_to_cuda")
    noted(Balancer, "finalize_model")
    noted(Executor, "reset_prefix_cache")
    noted(Storage, "fill")
    bench.update(worker, 2)
    assert list(dict.fromkeys(calls)) == [
        "pre_reload_weights",
        "reload",
        "process_weights_after_loading",
        "post_load_weights",
        "fill",
        "register_weight_slots_after_to_cuda",
        "finalize_model",
        "reset_prefix_cache",
    ]
    assert calls.count("pre_reload_weights") == calls.count("post_load_weights")  # once a module of that type


def test_modules_whose_weights_are_elsewhere_are_left_alone(bench, monkeypatch):
    worker = bench.worker_on(1)
    layer = worker.model.reloadable_layers()[2]
    monkeypatch.setattr(layer, "_weights_removed", True, raising=False)

    def pre_reload_weights():
        raise AssertionError("called on a module without weights")

    monkeypatch.setattr(layer, "pre_reload_weights", pre_reload_weights)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load_all()
    attempt.abort()


def test_only_what_is_of_the_bucket_is_cloned():
    ring, own = torch.arange(8.0), torch.ones(3)
    keeper = SimpleNamespace(one=ring[2:4], own=own, nested={"a": [ring[4:6], (ring[6:], "text")]}, empty=None)
    kept = held.own((keeper,), [ring[0:1]])
    assert kept == 4 * (2 + 3 + 2 + 2)
    ring.fill_(-1)
    assert keeper.one.tolist() == [2, 3]
    assert keeper.nested["a"][0].tolist() == [4, 5]
    assert keeper.nested["a"][1][0].tolist() == [6, 7]
    assert keeper.own is own


def test_a_kept_half_is_told_as_retained(bench):
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    items = {item[0]: item for batch in attempt.batches for item in batch}
    gate = items["model.layers.0.mlp.gate_proj.weight"]
    assert attempt.load_bucket(attempt.deliver([gate]).bucket).retained_bytes == gate[1].nbytes
    up = items["model.layers.0.mlp.up_proj.weight"]
    assert attempt.load_bucket(attempt.deliver([up]).bucket).retained_bytes == 0
    attempt.abort()


def leave_out(name):
    called = cycle._call

    def call(module, hook):
        if hook != name:
            called(module, hook)

    return "_call", call


def leave_out_the_clones():
    return "held", SimpleNamespace(own=lambda keepers, tensors: 0)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda: leave_out("pre_reload_weights"), "core.quantised_weights"),
        (lambda: leave_out("process_weights_after_loading"), "core.quantised_weights"),
        (lambda: leave_out("post_load_weights"), "core.flush_cache"),
        (leave_out_the_clones, "core.no_view_kept"),
    ],
    ids=["unrebuilt", "unprocessed", "underived", "borrowed"],
)
def test_the_suite_finds_a_step_that_is_left_out(stand_in, monkeypatch, change, check):
    monkeypatch.setattr(cycle, *change())
    (result,) = Runner(stand_in).run(select(Level.SHARDED, (), (check,))).results
    assert result.status is Status.FAILED


def test_an_engine_whose_balancer_was_not_told_produces_no_token(bench_of, monkeypatch):
    bench = bench_of(ModelKind.EXPERTS)
    worker = bench.worker()
    monkeypatch.setattr(cycle.compat, "balancer_of", lambda worker: None)
    bench.update(worker, 1)
    bench.harness.serve(worker)
    with pytest.raises(EngineStateError, match="the balancer was not told"):
        bench.tokens(worker)
