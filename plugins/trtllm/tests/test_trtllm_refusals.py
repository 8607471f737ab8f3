"""What is refused, by name and before anything is touched."""

from types import SimpleNamespace

import pytest
import torch

from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import LoadBucket, LoadTensor
from ckpt_core.errors import CoverageError, EngineStateError
from ckpt_trtllm import compat
from ckpt_trtllm.rank import TrtllmRank


def expect_refused(bench, worker, match):
    """By supports and by begin, and nothing is changed."""
    before = bench.bits(worker)
    with pytest.raises(EngineStateError, match=match):
        bench.hook.ckpt_supports(worker=worker)
    with pytest.raises(EngineStateError, match=match):
        bench.attempt(worker, 2).begin()
    bench.expect_bits(worker, before, "the weights before the refusal")


def test_an_open_update_of_the_engines_own(bench):
    worker = bench.worker_on(1)
    setattr(worker.model, compat.NATIVE_LATCH, True)
    expect_refused(bench, worker, "update_weights is open")
    worker.abort_natively("somebody gave it up")
    bench.update(worker, 2)


def test_adapters(bench):
    worker = bench.worker_on(1)
    worker.worker.engine.model_engine.model_loader.lora_config = object()
    expect_refused(bench, worker, "LoRA")


def test_a_draft_model(bench):
    worker = bench.worker_on(1)
    worker.model.__dict__["draft_model"] = object()
    expect_refused(bench, worker, "draft model")


def test_what_a_module_itself_refuses(bench, monkeypatch):
    worker = bench.worker_on(1)

    def check_reload_capability():
        raise NotImplementedError("not this kernel")

    monkeypatch.setattr(worker.model.reloadable_layers()[3], "check_reload_capability", check_reload_capability)
    expect_refused(bench, worker, "not this kernel")


def test_experts_that_a_balancer_moves(bench_of, monkeypatch):
    bench = bench_of(ModelKind.EXPERTS)
    worker = bench.worker_on(1)
    (path, experts), *_ = (item for item in worker.model.named_modules() if item[0].endswith("experts"))
    monkeypatch.setattr(experts, "_using_load_balancer", lambda: True, raising=False)
    expect_refused(bench, worker, path)


def test_an_executor_that_runs(bench):
    worker = bench.worker_on(1)
    worker.hold.leave()
    with pytest.raises(EngineStateError, match="rank 0: the executor is not paused"):
        bench.attempt(worker, 2).begin()


def test_a_start_without_files(bench, tmp_path):
    worker = bench.worker()
    worker.worker.hf_model_dir = tmp_path
    with pytest.raises(EngineStateError, match=r"expected \*\.safetensors"):
        bench.attempt(TrtllmRank(worker.worker), 1)


def test_a_tensor_that_comes_again(bench):
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)
    before = bench.bits(worker)
    name = attempt.batches[0][0][0]
    with pytest.raises(CoverageError, match=f"rank 0: tensor '{name}' came again"):
        attempt.load(0)
    bench.expect_bits(worker, before, "the weights before the repetition")
    attempt.abort()


def test_a_tensor_that_is_twice_in_a_bucket(bench):
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    name, tensor, _ = attempt.batches[0][0]
    attempt.begin()
    with pytest.raises(CoverageError, match="came again"):
        attempt.load_bucket(LoadBucket(index=0, tensors=(LoadTensor(name=name, tensor=tensor),) * 2))
    assert attempt.abort().value == "untouched"


def test_a_part_of_a_module_that_is_rebuilt_as_a_whole(bench_of):
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker_on(1)
    before = bench.bits(worker)
    names = ["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(EngineStateError, match=r"self_attn\.qkv_proj is rebuilt as a whole.*k_proj"):
        bench.attempt(worker, 2, names=names).begin()
    bench.expect_bits(worker, before, "the weights before the refusal")


def test_a_part_that_lands_nobody_knows_where_exactly(bench_of, monkeypatch):
    """A mapper that renames in a way the plugin does not know: what may be rebuilt around it must come whole."""
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker_on(1)
    monkeypatch.setattr(worker.worker.engine.model_engine.model_loader.weight_mapper, "mapping", {}, raising=False)
    again = TrtllmRank(worker.worker)
    again.hold = worker.hold
    names = [
        name
        for name in bench.checkpoint(2).tensors
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]
    with pytest.raises(EngineStateError, match=r"self_attn\.\w+ is rebuilt as a whole.*o_proj"):
        bench.attempt(again, 2, names=names).begin()
    bench.attempt(again, 2).run()
    bench.expect_fresh(again, bench.checkpoint(2))


def test_a_part_of_the_model_after_an_update_that_was_not_finished(bench):
    worker = bench.worker_on(1)
    failed = bench.attempt(worker, 2)
    failed.begin()
    failed.load(0)
    failed.abort()
    with pytest.raises(EngineStateError, match="send a whole checkpoint"):
        bench.attempt(worker, 2, names=["model.norm.weight"]).begin()
    bench.update(worker, 2)
    bench.attempt(worker, 1, names=["model.norm.weight"]).run()


def test_a_rank_of_several_that_nobody_told_its_instance(bench_of):
    worker = bench_of(ModelKind.SHARDED).worker()
    alone = TrtllmRank(worker.worker)
    with pytest.raises(EngineStateError, match="rank 1 of 2 has no instance id"):
        alone.identity.info()
    alone.identity.tell("first")
    alone.identity.tell("second")
    assert alone.identity.info().instance_id == "first"


def test_names_that_are_known_and_not_needed(bench_of):
    bench = bench_of(ModelKind.TIED)
    worker = bench.worker()
    tensors = {**bench.checkpoint(1).tensors, "lm_head.weight": torch.zeros(3)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    layout = bench.hook.ckpt_layout(worker=worker, manifest=bench.store.manifest_of(tensors))
    assert layout.unknown == ()
    assert SimpleNamespace(tied=compat.is_tied(worker.model)).tied
