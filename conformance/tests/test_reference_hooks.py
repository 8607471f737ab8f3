"""The plugin's hooks on a worker of one rank: what they do, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from ckpt_conformance.models.tiny import Arch, make_tiny, perturb
from ckpt_conformance.reference import plugin as reference
from ckpt_conformance.reference.checkpoint import read_tensors
from ckpt_conformance.reference.options import WorkerOptions
from ckpt_conformance.reference.worker import Worker
from ckpt_core.capability import Capability
from ckpt_core.contract import (
    AbortOutcome,
    EndpointState,
    LiveState,
    LoadBucket,
    LoadReport,
    LoadTensor,
    PauseMode,
    Update,
)
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import CoverageError, EngineStateError
from ckpt_core.manifest import Manifest
from ckpt_core.plugins import EnginePlugin
from ckpt_core.source import open_checkpoint

PROMPT = list(range(2, 30))
Tensors = dict[str, torch.Tensor]
hook = EnginePlugin(reference, name="reference").hook


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of one model."""
    root = tmp_path_factory.mktemp("models")
    first = make_tiny(root / "a", "qwen3", 1)
    return first, perturb(first, root / "b", 2)


def update_of(names: Iterable[str], update_id: str = "u1", *, partial: bool = False) -> Update:
    return Update(
        update_id=update_id, version=f"v-{update_id}", digest="00", expected=frozenset(names), partial=partial
    )


def load(worker: Worker, update: Update, tensors: Tensors, index: int = 0) -> LoadReport:
    items = tuple(LoadTensor(name=name, tensor=tensor) for name, tensor in tensors.items())
    report = hook.ckpt_load(worker=worker, update=update, bucket=LoadBucket(index=index, tensors=items))
    assert isinstance(report, LoadReport)
    return report


def run_update(worker: Worker, directory: Path, update_id: str = "u1") -> None:
    """A whole update as the core makes it, one bucket a tensor, each overwritten after the hook returned."""
    tensors = dict(read_tensors(directory))
    update = update_of(tensors, update_id)
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    for index, (name, tensor) in enumerate(tensors.items()):
        load(worker, update, {name: tensor}, index)
        tensor.view(torch.uint8).fill_(0xFF)
    hook.ckpt_finish(worker=worker, update=update)
    hook.ckpt_poison(worker=worker, cause=None)
    worker.flush_cache()
    worker.resume()


def poison_live(worker: Worker) -> None:
    for live in hook.ckpt_live(worker=worker).values():
        live.tensor.view(torch.uint8).fill_(0x7F)


def bits(worker: Worker) -> Tensors:
    return {name: live.tensor.clone() for name, live in hook.ckpt_live(worker=worker).items()}


def addresses(worker: Worker) -> dict[str, int]:
    return {name: live.tensor.data_ptr() for name, live in hook.ckpt_live(worker=worker).items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("quantise", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_update_equals_a_fresh_start_in_the_same_storage(
    tmp_path: Path, arch: Arch, tied: bool, quantise: bool
) -> None:
    directory = make_tiny(tmp_path, arch, 8, tied=tied)
    fresh = Worker(directory, WorkerOptions(quantise=quantise))
    worker = Worker(directory, WorkerOptions(quantise=quantise, load_format="dummy"))
    before = addresses(worker)
    for update_id in ("u1", "u2"):
        poison_live(worker)
        run_update(worker, directory, update_id)
        assert equal(bits(worker), bits(fresh))
        assert addresses(worker) == before
        assert worker.version == f"v-{update_id}"
    assert worker.generate(PROMPT, 16) == fresh.generate(PROMPT, 16)


def test_quantised_weights_are_tagged_and_no_full_precision_copy_stays(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0], WorkerOptions(quantise=True))
    live = hook.ckpt_live(worker=worker)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert live[f"{name}_int8"].state is LiveState.PROCESSED
    assert live[f"{name}_int8"].tensor.dtype is torch.int8
    assert live["model.norm.weight"].state is LiveState.PURE
    assert name not in live
    held = {id(p): p.nbytes for p in (*worker.model.parameters(), *worker.model.buffers())}
    assert sum(held.values()) == sum(item.tensor.nbytes for item in live.values())


def test_quantised_module_must_arrive_whole(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0], WorkerOptions(quantise=True))
    before = bits(worker)
    name = "model.layers.0.self_attn.q_proj.weight"
    update = update_of([name], partial=True)
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, {name: dict(read_tensors(models[1]))[name]})
    with pytest.raises(EngineStateError, match="2 of its 3 parts did not arrive"):
        hook.ckpt_finish(worker=worker, update=update)
    assert hook.ckpt_abort(worker=worker, update=update, cause="partly") is AbortOutcome.RELOADABLE
    assert equal(bits(worker), before)


def test_partial_update_changes_only_what_it_brings(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    before, name = bits(worker), "model.norm.weight"
    update = update_of([name], partial=True)
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, {name: dict(read_tensors(models[1]))[name]})
    hook.ckpt_finish(worker=worker, update=update)
    hook.ckpt_poison(worker=worker, cause=None)
    changed = {key for key, tensor in bits(worker).items() if not torch.equal(tensor, before[key])}
    assert changed == {name}
    worker.resume()


def test_prefix_cache_goes_stale_until_it_is_flushed(models: tuple[Path, Path]) -> None:
    worker, fresh = Worker(models[0]), Worker(models[1])
    worker.generate(PROMPT, 8)
    tensors = dict(read_tensors(models[1]))
    worker.pause()
    update = update_of(tensors)
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, tensors)
    hook.ckpt_finish(worker=worker, update=update)
    worker.resume()
    expected = fresh.generate(PROMPT, 8)
    assert worker.generate(PROMPT, 8) != expected, "the old keys and values should show"
    worker.flush_cache()
    assert worker.generate(PROMPT, 8) == expected


def test_begin_refuses_and_changes_nothing(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    before, update = bits(worker), update_of(["model.norm.weight"])
    with pytest.raises(EngineStateError, match="expected paused"):
        hook.ckpt_begin(worker=worker, update=update)
    assert worker.state is EndpointState.SERVING
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    with pytest.raises(EngineStateError, match="already runs update 'u1'"):
        hook.ckpt_begin(worker=worker, update=update_of([], "u2"))
    assert worker.updating == update
    assert hook.ckpt_abort(worker=worker, update=update, cause="test") is AbortOutcome.UNTOUCHED
    assert equal(bits(worker), before)
    worker.sleep()
    with pytest.raises(EngineStateError, match="asleep"):
        hook.ckpt_begin(worker=worker, update=update)
    assert worker.state is EndpointState.ASLEEP


def test_load_and_finish_need_their_own_update(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    worker.pause()
    stranger = update_of([], "stranger")
    with pytest.raises(EngineStateError, match="not running here"):
        load(worker, stranger, {})
    hook.ckpt_begin(worker=worker, update=update_of([]))
    with pytest.raises(EngineStateError, match="running: u1"):
        hook.ckpt_finish(worker=worker, update=stranger)


def test_bad_bucket_is_refused_before_its_first_write(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    before = bits(worker)
    good = dict(read_tensors(models[1]))["model.norm.weight"]
    update = update_of(["model.norm.weight", "nobody"])
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    with pytest.raises(CoverageError, match="nobody"):
        load(worker, update, {"model.norm.weight": good, "nobody": good})
    assert hook.ckpt_abort(worker=worker, update=update, cause="bad") is AbortOutcome.UNTOUCHED
    assert equal(bits(worker), before)


def test_finish_misses_what_was_expected(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    update = update_of(["model.norm.weight"])
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    with pytest.raises(CoverageError, match=r"1 expected tensors did not arrive: \['model\.norm\.weight'\]"):
        hook.ckpt_finish(worker=worker, update=update)


@pytest.mark.parametrize("finished", [False, True], ids=["loading", "finished"])
def test_abort_leaves_a_guard_that_only_a_load_or_restore_lifts(models: tuple[Path, Path], finished: bool) -> None:
    worker, fresh = Worker(models[0]), Worker(models[1])
    tensors = dict(read_tensors(models[1]))
    update = update_of(tensors)
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, tensors if finished else {"model.norm.weight": tensors["model.norm.weight"]})
    if finished:
        hook.ckpt_finish(worker=worker, update=update)
    for _ in range(2):
        outcome = hook.ckpt_abort(worker=worker, update=update, cause="the controller went away")
        assert outcome is AbortOutcome.RELOADABLE
    worker.paused = False  # somebody resumes behind our back
    for lifted in (False, True):
        if lifted:  # an untouched update disarms the core's guard; the engine's own stays
            worker.paused = True
            other = update_of([], "u2")
            hook.ckpt_begin(worker=worker, update=other)
            assert hook.ckpt_abort(worker=worker, update=other, cause="x") is AbortOutcome.UNTOUCHED
            hook.ckpt_poison(worker=worker, cause=None)
            worker.paused = False
        assert worker.state is EndpointState.POISONED
        with pytest.raises(EngineStateError, match="produces no token, it is poisoned"):
            worker.generate(PROMPT, 1)
    run_update(worker, models[1], "u3")
    assert worker.generate(PROMPT, 8) == fresh.generate(PROMPT, 8)


def test_poison_guard_stops_tokens_until_disarmed(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    hook.ckpt_poison(worker=worker, cause="digest differs")
    with pytest.raises(EngineStateError, match="poisoned: digest differs"):
        worker.generate(PROMPT, 1)
    with pytest.raises(EngineStateError, match="poisoned: digest differs"):
        worker.resume()
    hook.ckpt_poison(worker=worker, cause=None)
    assert len(worker.generate(PROMPT, 1)) == 1


@pytest.mark.parametrize("quantise", [False, True], ids=["plain", "int8"])
def test_restore_brings_the_old_bits_back_in_place(models: tuple[Path, Path], quantise: bool) -> None:
    worker = Worker(models[0], WorkerOptions(quantise=quantise))
    before, where, expected = bits(worker), addresses(worker), worker.generate(PROMPT, 8)
    tensors = dict(read_tensors(models[1]))
    update = update_of(tensors)
    worker.pause()
    snapshot = hook.ckpt_snapshot(worker=worker, update=update)
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, tensors)
    with pytest.raises(EngineStateError, match="cannot restore"):
        hook.ckpt_restore(worker=worker, update=update, snapshot=snapshot)
    hook.ckpt_finish(worker=worker, update=update)
    assert not equal(bits(worker), before)
    hook.ckpt_abort(worker=worker, update=update, cause="test")
    hook.ckpt_restore(worker=worker, update=update, snapshot=snapshot)
    assert equal(bits(worker), before)
    assert addresses(worker) == where
    worker.flush_cache()
    worker.resume()
    assert worker.generate(PROMPT, 8) == expected


def test_sleep_drops_the_weights_and_only_a_commit_serves_again(models: tuple[Path, Path]) -> None:
    worker, fresh = Worker(models[0]), Worker(models[1])
    with pytest.raises(EngineStateError, match="pause it first"):
        worker.sleep()
    worker.pause()
    worker.sleep()
    assert not list(worker.model.parameters())
    with pytest.raises(EngineStateError, match="has no weights"):
        hook.ckpt_live(worker=worker)
    worker.wake(["weights"])
    assert worker.state is EndpointState.ASLEEP  # the key-value cache still is
    tensors = dict(read_tensors(models[1]))
    update = update_of(tensors)
    hook.ckpt_begin(worker=worker, update=update)
    load(worker, update, tensors)
    hook.ckpt_finish(worker=worker, update=update)
    worker.wake(["kv_cache"])
    assert worker.state is EndpointState.WAITING_FOR_WEIGHTS
    hook.ckpt_poison(worker=worker, cause=None)
    worker.resume()
    assert worker.generate(PROMPT, 8) == fresh.generate(PROMPT, 8)


def test_waiting_worker_produces_nothing_before_the_first_commit(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0], WorkerOptions(load_format="dummy", wait_for_weights=True))
    assert worker.state is EndpointState.WAITING_FOR_WEIGHTS
    with pytest.raises(EngineStateError, match="waiting_for_weights"):
        worker.generate(PROMPT, 1)
    worker.pause()
    nothing = update_of([], "u0")
    hook.ckpt_begin(worker=worker, update=nothing)
    hook.ckpt_abort(worker=worker, update=nothing, cause="test")
    hook.ckpt_poison(worker=worker, cause=None)
    assert worker.state is EndpointState.WAITING_FOR_WEIGHTS
    run_update(worker, models[0])
    assert worker.generate(PROMPT, 4) == Worker(models[0]).generate(PROMPT, 4)


def test_layout_tells_what_does_not_fit(tmp_path: Path) -> None:
    tied = Worker(make_tiny(tmp_path / "tied", "llama", 1, tied=True))
    untied = make_tiny(tmp_path / "untied", "llama", 1, layers=3, intermediate=96)
    manifest = Manifest.from_index(open_checkpoint(untied))
    layout = hook.ckpt_layout(worker=tied, manifest=manifest)
    assert layout.missing == ()
    assert {name.split(".")[2] for name in layout.unknown} == {"2"}, "the tied head is known, and ignored"
    wrong = {item.tensor: (item.expected, item.got) for item in layout.mismatched}
    assert wrong["model.layers.0.mlp.up_proj.weight"] == ("BF16 [192, 96]", "BF16 [96, 96]")
    assert len(wrong) == 6
    groups = {entry.tensor: entry.group for entry in layout.entries}
    assert groups["model.layers.1.self_attn.k_proj.weight"] == "model.layers.1.self_attn"
    assert all(entry.box is None for entry in layout.entries)
    assert "lm_head.weight" not in groups


def test_layout_names_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    worker = Worker(make_tiny(tmp_path / "moe", "qwen3_moe", 1))
    tied = make_tiny(tmp_path / "tied", "qwen3_moe", 1, tied=True, dtype="float32")
    layout = hook.ckpt_layout(worker=worker, manifest=Manifest.from_index(open_checkpoint(tied)))
    assert layout.missing == ("lm_head.weight",)
    assert layout.mismatched[0].got.startswith("F32 [100, 96]")
    groups = {entry.tensor: entry.group for entry in layout.entries}
    assert groups["model.layers.0.mlp.experts.3.up_proj.weight"] == "model.layers.0.mlp"


def test_tied_head_is_reported_as_ignored(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "llama", 1, tied=True)
    worker = Worker(directory)
    embedding = dict(read_tensors(directory))["model.embed_tokens.weight"]
    update = update_of(["lm_head.weight"], partial=True)
    worker.pause()
    hook.ckpt_begin(worker=worker, update=update)
    report = load(worker, update, {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding})
    assert report == LoadReport(loaded=("model.embed_tokens.weight",), ignored=("lm_head.weight",))


def test_identity_and_capabilities(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    info = hook.ckpt_identify(worker=worker)
    assert (info.rank, info.world_size, info.instance_id) == (0, 1, worker.instance_id)
    assert info.device_uuid != hook.ckpt_identify(worker=Worker(models[0])).device_uuid
    engine = hook.ckpt_engine_info()
    assert engine.support(Capability.DRAFT_MODEL).usable
    assert not engine.support(Capability.LORA).usable
    assert engine.support(Capability.DRAFT_MODEL).detail
    assert set(engine.capabilities) == set(Capability)


def test_worker_is_an_endpoint_of_its_own(models: tuple[Path, Path]) -> None:
    worker = Worker(models[0])
    endpoint = Endpoint(url="inproc://worker", engine="reference", handle=worker)
    assert hook.ckpt_ready(endpoint=endpoint).state is EndpointState.SERVING
    hook.ckpt_pause(endpoint=endpoint, mode=PauseMode.KEEP)
    status = hook.ckpt_ready(endpoint=endpoint)
    assert (status.state, status.instance_id) == (EndpointState.PAUSED, worker.instance_id)
    hook.ckpt_flush_cache(endpoint=endpoint)
    hook.ckpt_resume(endpoint=endpoint, version="v7")
    assert hook.ckpt_ready(endpoint=endpoint).version == "v7"
