"""The main job: after an update the engine is what a fresh start on that checkpoint would be, bit for bit."""
# ruff: noqa: PLR0917 (arguments are fixtures)

import gc
import os
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_conformance.reference.worker import Worker, WorkerOptions
from ckpt_core import Outcome, limits, open_checkpoint, update
from ckpt_core.api import Target
from ckpt_core.config import VerifyLevel
from ckpt_core.cuda import probe
from ckpt_core.metrics import Stage
from ckpt_core.verify import fingerprint

KINDS = [("llama", False), ("llama", True), ("qwen3_moe", False), ("qwen3_moe", True)]


def all_differ(one, other):
    return all(ranks[name] != theirs[name] for ranks, theirs in zip(one, other, strict=True) for name in ranks)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2, 3], ids=lambda tp: f"tp{tp}")
def test_an_updated_engine_equals_a_fresh_start(checkpoint_of, updater_of, answer_of, arch, tied, tp):
    """Fresh on A, then B, then A again: every tensor changes on the way, and all are back at the end."""
    first, second = (checkpoint_of(arch, tied=tied, which=which) for which in "ab")
    with ReferenceServer(first, tp=tp) as server:
        fresh, said = server.live_digests(), answer_of(server)
        updater = updater_of(server)
        there = updater.update(second, version="B")
        assert all_differ(fresh, server.live_digests())
        assert answer_of(server) != said
        assert server.status()["version"] == "B"
        back = updater.update(first, version="A")
        assert server.live_digests() == fresh
        assert answer_of(server) == said
        again = updater.update(first, version="A")
        assert [rank.fingerprint for rank in again.ranks] == [rank.fingerprint for rank in back.ranks]
        assert all(a.fingerprint != b.fingerprint for a, b in zip(there.ranks, back.ranks, strict=True))
        assert [rank.rank for rank in back.ranks] == list(range(tp))
        assert all(rank.stats.digested_bytes and not rank.stats.live_bytes for rank in there.ranks)  # as they arrived
        assert all(rank.stats.live_bytes and not rank.stats.digested_bytes for rank in back.ranks)  # as they live
        assert (there.verified, back.verified) == ("arrival", "live")
        answered = server.generate([5, 17], 4, ignore_eos=True)
        assert {span["version"] for span in answered["weight_versions"]} == {"A"}
        assert server.status()["state"] == "serving"


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tp", [2, 3], ids=lambda tp: f"tp{tp}")
def test_recorded_slices_are_enough(checkpoint_of, updater_of, arch, tp):
    """Without arrival digests a rank asks for what its loader takes, and gets it past the loader."""
    first, second = (checkpoint_of(arch, which=which) for which in "ab")
    with ReferenceServer(first, tp=tp) as server:
        fresh = server.live_digests()
        updater = updater_of(server, verify=VerifyLevel.NONE)
        watched = updater.update(second, version="B")
        assert [rank.stats.replayed_bytes for rank in watched.ranks] == [0] * tp
        replayed = updater.update(first, version="A")
        assert server.live_digests() == fresh
        assert sum(rank.stats.replayed_bytes for rank in replayed.ranks) < 0.8 * tp * replayed.size_bytes
        assert all(rank.stats.recorded_share == 1 for rank in replayed.ranks)
        assert all(rank.stats.replayed_bytes <= rank.stats.received_bytes for rank in replayed.ranks)
        assert all(rank.stats.learned for rank in watched.ranks)
        loaded = updater_of(server, replay=False).update(second, version="B")
        assert [rank.fingerprint for rank in loaded.ranks] == [rank.fingerprint for rank in watched.ranks]
        assert [rank.stats.replayed_bytes for rank in loaded.ranks] == [0] * tp


def test_reports_say_what_the_transfer_should_have_taken(
    checkpoint_of, updater_of, start_server, tmp_path, monkeypatch
):
    server = start_server(checkpoint_of())
    monkeypatch.setenv("CKPT_CACHE_DIR", str(tmp_path))
    assert updater_of(server).update(checkpoint_of(which="b")).predicted is None, "never measured"
    with probe.open_gpus() as gpus:
        limits.save(tmp_path, limits.measure(limits.identify(), gpus, 0.05))
    predicted = updater_of(server).update(checkpoint_of()).predicted
    assert 0 < predicted.lower_bound_s <= predicted.seconds
    assert predicted.bottleneck


def test_a_babbling_start_becomes_what_the_checkpoint_says(checkpoint_of, updater_of, answer_of, start_server):
    directory = checkpoint_of("qwen3_moe", which="b")
    server, fresh = start_server(directory, tp=2, load_format="dummy"), start_server(directory, tp=2)
    assert answer_of(server) != answer_of(fresh)
    updater_of(server).update(directory)
    assert answer_of(server) == answer_of(fresh)
    assert server.live_digests() == fresh.live_digests()


@pytest.mark.parametrize(("arch", "tied"), KINDS, ids=str)
def test_the_reported_fingerprint_is_that_of_a_fresh_worker(checkpoint_of, updater_of, arch, tied):
    directory = checkpoint_of(arch, tied=tied)
    worker, fresh = Worker(directory, WorkerOptions(load_format="dummy")), Worker(directory)
    assert fingerprint(worker.live()) != fingerprint(fresh.live())
    report = updater_of(worker).update(directory)
    assert report.ranks[0].fingerprint == fingerprint(fresh.live()) == fingerprint(worker.live())
    assert report.outcome is Outcome.COMMITTED


def test_a_quantised_engine_equals_a_fresh_quantised_start(checkpoint_of, updater_of):
    first, second = checkpoint_of(which="a"), checkpoint_of(which="b")
    worker, fresh = (Worker(path, WorkerOptions(quantise=True)) for path in (first, second))
    addresses = {name: live.tensor.data_ptr() for name, live in worker.live().items()}
    report = updater_of(worker).update(second)
    assert report.ranks[0].fingerprint == fingerprint(fresh.live())
    assert {name: live.tensor.data_ptr() for name, live in worker.live().items()} == addresses


def test_two_instances_move_together(checkpoint_of, updater_of, start_server):
    first, second = checkpoint_of(which="a"), checkpoint_of(which="b")
    servers = [start_server(first), start_server(first, tp=2)]
    worker = Worker(second)
    report = updater_of(*servers).update(second, version="both")
    assert [(rank.endpoint, rank.rank) for rank in report.ranks] == [
        (servers[0].url, 0),
        (servers[1].url, 0),
        (servers[1].url, 1),
    ]
    assert len(report.agents) == 3
    assert [server.status()["version"] for server in servers] == ["both", "both"]
    assert report.ranks[0].fingerprint == fingerprint(worker.live())


def files_in(root):
    """Shared memory in use, that of other tests' version pools, too."""
    return {path for path in root.rglob("*") if path.is_file()}


def test_repeated_updates_keep_agents_and_memory(checkpoint_of, updater_of, roots):
    worker = Worker(checkpoint_of(), WorkerOptions(load_format="dummy"))
    updater, before = updater_of(worker), files_in(roots[0])
    prints, agents, descriptors = [], set(), set()
    for number in range(6):
        report = updater.update(checkpoint_of(which="ab"[number % 2]), version=str(number))
        prints.append(report.ranks[0].fingerprint)
        agents.add(updater.agent_pids)
        descriptors.add(len(os.listdir("/proc/self/fd")))
        assert files_in(roots[0]) == before  # rings are given back in between
    assert len(agents) == 1
    assert prints == prints[:2] * 3
    assert len(descriptors) == 1


def test_tensors_in_memory(checkpoint_of, tensors_of, updater_of):
    directory = checkpoint_of("qwen3_moe")
    tensors = tensors_of(directory)
    # not contiguous, and parameters: as a trainer has them
    tensors = {name: torch.nn.Parameter(t.t().contiguous().t() if t.dim() == 2 else t) for name, t in tensors.items()}
    worker, fresh = Worker(directory, WorkerOptions(load_format="dummy")), Worker(directory)
    report = updater_of(worker).update(tensors, version="trained")
    assert report.ranks[0].fingerprint == fingerprint(fresh.live())
    assert report.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert worker.version == "trained"


def test_the_pool_of_tensors_in_memory_is_kept_once(checkpoint_of, tensors_of, updater_of, roots):
    """Where one version is to stay: the same names and shapes go into the same pool; others replace it."""
    worker = Worker(checkpoint_of())
    updater = updater_of(worker, allow_unexpected=True, keep_versions=1)

    before = files_in(roots[0])

    def pools():
        return files_in(roots[0]) - before

    for which in "bab":
        report = updater.update(tensors_of(checkpoint_of(which=which)))
        assert report.ranks[0].fingerprint == fingerprint(Worker(checkpoint_of(which=which)).live())
        (pool,) = pools()
    more = {**tensors_of(checkpoint_of(which="a")), "more": torch.zeros(7)}
    updater.update(more)
    (other,) = pools()
    assert other != pool


def used_bytes(root):
    mine = (path for path in root.rglob("*") if path.is_file() and "ckpt-versions-" not in str(path))
    return sum(path.stat().st_blocks * 512 for path in mine)


@pytest.fixture
def large():
    """A checkpoint of some MB in shared memory, outside the folder that updates use."""
    with tempfile.TemporaryDirectory(prefix="ckpt-test-source-", dir="/dev/shm") as directory:
        yield make_tiny(Path(directory) / "m", seed=3, intermediate=6000, vocab=2000)


def peaks(monkeypatch, root):
    """Shared memory in use at every bucket that a worker loads."""
    seen = []
    load = Worker.load

    def noting(worker, given, tensors):
        seen.append(used_bytes(root))
        return load(worker, given, tensors)

    monkeypatch.setattr(Worker, "load", noting)
    return seen


def test_files_in_shared_memory_are_used_in_place(large, updater_of, roots, monkeypatch):
    size_bytes = open_checkpoint(large).size_bytes
    worker = Worker(large, WorkerOptions(load_format="dummy"))
    seen = peaks(monkeypatch, roots[0])
    report = updater_of(worker).update(large)
    assert len(seen) > 3
    assert max(seen) <= report.ring_bytes + 16384 < size_bytes / 2


def test_tensors_in_memory_are_copied_once(large, tensors_of, updater_of, roots, monkeypatch):
    tensors = tensors_of(large)
    worker = Worker(large, WorkerOptions(load_format="dummy"))
    seen = peaks(monkeypatch, roots[0])
    report = updater_of(worker).update(tensors)
    padding = 256 * len(tensors)
    assert report.size_bytes <= max(seen) <= report.size_bytes + padding + report.ring_bytes + 32768


def test_a_pool_that_its_owner_rewrites_in_place_is_sent_as_it_is_now(large, updater_of):
    """A trainer stores the next weights through its mapping; that leaves no trace in the file's times."""
    worker = Worker(large, WorkerOptions(load_format="dummy"))
    updater = updater_of(worker)
    before = updater.update(large)
    path = large / "model.safetensors"
    times = path.stat()
    changed = perturb(large, large.parent / "changed", seed=9)
    path.write_bytes((changed / "model.safetensors").read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = updater.update(large)
    assert after.digest != before.digest
    assert after.ranks[0].fingerprint == fingerprint(Worker(changed).live())


def test_one_call_does_it_all_and_reports_progress(checkpoint_of):
    worker = Worker(checkpoint_of(), WorkerOptions(load_format="dummy"))
    stages = []
    report = update(
        checkpoint_of(),
        [Target(engine="reference", url=f"one-call-{os.getpid()}", handle=worker)],
        on_progress=lambda stage, _done, _total: stages.append(stage),
    )
    assert set(stages) <= {Stage.PREPARE, Stage.TRANSFER}
    assert set(report.stages) == {stage.value for stage in Stage}
    assert report.version == report.digest[:12] == worker.version


def test_an_engine_of_this_process_can_go_after_its_update(checkpoint_of):
    """Nothing that is kept for the next update keeps an engine alive."""
    worker = Worker(checkpoint_of())
    update(checkpoint_of(which="b"), [Target(engine="reference", url=f"mortal-{os.getpid()}", handle=worker)])
    watched = weakref.ref(worker)
    del worker
    gc.collect()
    assert watched() is None


def test_a_stale_cache_does_not_survive_an_update(checkpoint_of, updater_of, answer_of):
    worker = Worker(checkpoint_of(which="a"))
    answer_of(worker)  # fills the prefix cache
    updater_of(worker).update(checkpoint_of(which="b"))
    assert answer_of(worker) == answer_of(Worker(checkpoint_of(which="b")))
