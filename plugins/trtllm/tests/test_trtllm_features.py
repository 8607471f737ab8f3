"""What an engine has is found by looking, and what it lacks is named or done without."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import RankInfo
from ckpt_core.errors import EngineStateError
from ckpt_trtllm import compat
from ckpt_trtllm.calls import RankCalls
from ckpt_trtllm.rank import TrtllmRank
from ckpt_trtllm.standin.executor import Executor
from ckpt_trtllm.standin.loader import ModelLoader
from ckpt_trtllm.standin.model import StandInModel
from ckpt_trtllm.standin.worker import StandInWorker


def test_all_of_the_stand_in_is_found(bench):
    features = bench.worker().features
    assert features.missing == ()
    assert features.partial_loading
    assert features.drain_option
    assert features.loader_cycle
    assert features.native_abort


def test_a_worker_without_an_engine_is_told_what_it_lacks():
    with pytest.raises(EngineStateError, match=r"engine\.control_action.*engine\.model_engine\.model_loader\.reload"):
        TrtllmRank(SimpleNamespace(device_id=0))
    assert "lacks engine.control_action" in RankCalls.ckpt_status(SimpleNamespace())["error"]


@pytest.mark.parametrize(
    "path", ["reset_prefix_cache", "control_action", "model_engine.forward", "model_engine.model_loader.reload"]
)
def test_each_name_that_is_needed_is_missed(path):
    def function(): ...

    loader = SimpleNamespace(reload=function)
    model = SimpleNamespace(load_weights=function, named_modules=function)
    model_engine = SimpleNamespace(forward=function, model=model, model_loader=loader)
    engine = SimpleNamespace(reset_prefix_cache=function, control_action=function, model_engine=model_engine)
    worker = SimpleNamespace(engine=engine)
    assert compat.features_of(worker).missing == ()
    owner, _, name = f"engine.{path}".rpartition(".")
    delattr(compat._at(worker, owner), name)
    assert compat.features_of(worker).missing == (f"engine.{path}",)


def test_an_engine_without_the_newer_calls_is_updated(bench_of, monkeypatch):
    """As in the first releases with a weight update: no drain, no word to the loader, no abort."""

    @contextmanager
    def control_action(engine):
        with newer(engine):
            yield engine

    newer = Executor.control_action
    monkeypatch.setattr(Executor, "control_action", control_action)
    monkeypatch.delattr(StandInWorker, "abort_update_weights")
    for name in ("begin_update_weights", "finalize_update_weights", "abort_update_weights"):
        monkeypatch.delattr(ModelLoader, name)
    bench = bench_of(ModelKind.QUANTISED)
    worker = bench.worker()
    found = worker.features
    assert (found.drain_option, found.loader_cycle, found.native_abort) == (False, False, False)
    first = bench.attempt(worker, 1)
    first.begin()
    first.load(0)
    first.abort()
    bench.update(worker, 2)
    bench.expect_fresh(worker, bench.checkpoint(2))


def test_a_model_that_must_come_in_one_piece_is_refused(bench, monkeypatch):
    def load_weights(self, weights, weight_mapper): ...

    fits = bench.worker()
    bench.hook.ckpt_supports(worker=fits)
    monkeypatch.setattr(StandInModel, "load_weights", load_weights)
    worker = TrtllmRank(fits.worker)
    assert not worker.features.partial_loading
    with pytest.raises(EngineStateError, match="allow_partial_loading"):
        bench.hook.ckpt_supports(worker=worker)


def test_a_compiled_model_is_unwrapped(bench):
    worker = bench.worker()
    engine = worker.worker.engine.model_engine
    inner = engine.model
    engine.model = SimpleNamespace(_orig_mod=inner, load_weights=None, named_modules=None)
    assert compat.model_of(worker.worker) is inner
    engine.model = inner


def test_what_the_engine_does_not_tell_has_a_default():
    worker = SimpleNamespace(engine=SimpleNamespace())
    assert compat.in_flight(worker) is None
    assert compat.place_of(worker)["world_size"] == 1
    assert compat.model_directory(worker) is None
    assert compat._takes(None, "drain") is False


def test_the_parallel_place_is_that_of_the_engines_mapping(bench_of):
    place = compat.place_of(bench_of(ModelKind.SHARDED).worker().worker)
    assert (place["rank"], place["world_size"], place["tp_rank"], place["tp_size"]) == (1, 2, 1, 2)
    assert set(place) <= set(inspect.signature(RankInfo).parameters)


def test_the_directory_is_found_under_each_name(tmp_path):
    for worker in (
        SimpleNamespace(hf_model_dir=tmp_path),
        SimpleNamespace(_hf_model_dir=str(tmp_path)),
        SimpleNamespace(llm_args=SimpleNamespace(model=str(tmp_path))),
    ):
        assert compat.model_directory(worker) == tmp_path
    assert compat.model_directory(SimpleNamespace(llm_args=SimpleNamespace(model="org/name"))) is None
