"""The pool: versions stay warm, each content is stored once, and what nobody uses is given back, kill -9 or not."""

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_core import owned, segment_copy, segments
from ckpt_core.dtypes import DType
from ckpt_core.errors import CapacityError, ConfigError, ManifestError, VerificationError
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.pool_file import stage_tensors
from ckpt_core.punch import PAGE_BYTES, gaps_between, pages_of
from ckpt_core.source import DeviceRegion, Extent, SourceFile, SourceIndex
from ckpt_core.store import Store
from ckpt_core.version_pool import VersionPool

MUCH = 1 << 40
SIZE = 10 * PAGE_BYTES + 100  # of a tensor: whole pages, and a rest


def content(number, size=SIZE):
    return random.Random(number).randbytes(size)


def write(path, tensors):
    """A file of U8 tensors, given as bytes by name, with its index and manifest."""
    extents, offset = [], 0
    with open(path, "wb") as file:
        for name in sorted(tensors):
            data = tensors[name]
            offset = -(-offset // 256) * 256
            file.seek(offset)
            file.write(data)
            extents.append(
                Extent(name=name, dtype=DType.U8, shape=(len(data),), file=0, offset_bytes=offset, size_bytes=len(data))
            )
            offset += len(data)
        file.truncate(max(offset, 1))
    index = SourceIndex(files=(SourceFile.of(path),), extents=tuple(extents))
    digests = {name: content_digest(data) for name, data in tensors.items()}
    return index, Manifest.from_index(index, digests)


def read(index):
    """All tensors, as bytes by name."""
    tensors = {}
    for extent in index.extents:
        data = Path(index.files[extent.file].path).read_bytes()
        tensors[extent.name] = data[extent.offset_bytes : extent.offset_bytes + extent.size_bytes]
    return tensors


def paths(record):
    return [Path(file.path) for file in record.index.files]


def own(pool, tensors, label):
    with pool.staging() as directory:
        index, manifest = write(directory / "staged", tensors)
        return pool.own(index, manifest, label)


@pytest.fixture(params=["disk", "memory"])
def place(request, tmp_path):
    """Where the pool goes: two file systems that punch holes in ways of their own."""
    made = tempfile.TemporaryDirectory(dir="/dev/shm") if request.param == "memory" else nullcontext(str(tmp_path))
    with made as root:
        yield Path(root) / "pool"


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def pool(store, place):
    return VersionPool(store, place)


@pytest.fixture
def copy(pool, tmp_path):
    """Copies tensors into the pool from a file that is removed then."""

    def run(tensors, label=""):
        index, manifest = write(tmp_path / "source", tensors)
        try:
            return pool.store_copy(index, manifest, label)
        finally:
            (tmp_path / "source").unlink()

    return run


# -- in place ----------------------------------------------------------------------------------------------------------
def test_files_are_used_where_they_are(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    record = pool.keep(index, manifest, "v1")
    assert pool.index_of("v1") == index
    assert pool.find(manifest.digest[:8]).index == index
    assert pool.versions() == (pool.find("v1"),)
    assert pool.warm(record)
    assert pool.size_bytes == 0


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"other"), lambda path: path.unlink()])
def test_a_version_whose_file_changed_is_cold(pool, tmp_path, change):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    record = pool.keep(index, manifest, "v1")
    change(tmp_path / "a")
    assert not pool.warm(record)
    with pytest.raises(
        ConfigError, match=r"'v1' is cold: file '.*/a' changed or is gone; adopt or update from another"
    ):
        pool.index_of("v1")
    index, manifest = write(tmp_path / "b", {"x": content(1)})
    pool.keep(index, manifest, "")
    assert pool.index_of("v1") == index


def test_a_file_that_changed_already_is_not_kept(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    (tmp_path / "a").write_bytes(b"other")
    for add in (pool.keep, pool.store_copy):
        with pytest.raises(ManifestError, match="changed since it was opened"):
            add(index, manifest, "v1")
    assert pool.versions() == ()


def test_a_version_in_the_pool_stays_there(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    copied = pool.store_copy(index, manifest, "v1")
    assert pool.keep(index, manifest, "best").index == copied.index
    (tmp_path / "a").unlink()
    assert read(pool.index_of("best")) == {"x": content(1)}


def test_files_of_the_pool_are_not_kept_in_place(pool, copy):
    record = copy({"x": content(1)})
    with pytest.raises(ConfigError, match="expected a file outside the pool"):
        pool.keep(record.index, record.manifest, "v1")


def test_device_memory_and_foreign_manifests_are_refused(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    region = DeviceRegion(uuid="GPU-1", handle="00", size_bytes=1)
    for add in (pool.keep, pool.store_copy, pool.own):
        with pytest.raises(ManifestError, match="device memory"):
            add(replace(index, regions=(region,)), manifest, "")
        with pytest.raises(ManifestError, match="of one checkpoint"):
            add(index, write(tmp_path / "b", {"y": content(1)})[1], "")


# -- copies ------------------------------------------------------------------------------------------------------------
def test_a_copy_outlives_its_files(pool, copy):
    tensors = {"x": content(1), "empty": b"", "y": content(2, 3 << 20)}
    record = copy(tensors, "v1")
    assert read(pool.index_of("v1")) == tensors
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths(record)] == [0o600]
    assert stat.S_IMODE(pool.directory.stat().st_mode) == 0o700
    assert all(extent.offset_bytes % 256 == 0 for extent in record.index.extents)


def test_what_versions_share_is_stored_once(pool, copy):
    first = copy({"x": content(1), "y": content(2)}, "v1")
    size = pool.size_bytes
    second = copy({"x": content(1), "y": content(3), "renamed": content(2), "twice": content(3)}, "v2")
    assert pool.size_bytes - size < SIZE + 2 * PAGE_BYTES
    assert len(second.index.files) == 2
    assert paths(first)[0] in paths(second)
    assert read(pool.index_of("v2")) == {"x": content(1), "y": content(3), "renamed": content(2), "twice": content(3)}


def test_one_content_of_two_shapes_is_two_tensors(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1, 64)})
    pool.store_copy(index, manifest, "flat")
    square = replace(index, extents=(replace(index.extents[0], shape=(8, 8)),))
    record = pool.store_copy(square, Manifest.from_index(square, {"x": content_digest(content(1, 64))}), "square")
    assert record.index.extents[0].shape == (8, 8)
    assert read(record.index) == {"x": content(1, 64)}


def test_the_same_version_again_copies_nothing(pool, copy):
    first = copy({"x": content(1)}, "v1")
    size = pool.size_bytes
    assert copy({"x": content(1)}, "v2").index == first.index
    assert pool.size_bytes == size
    assert pool.find("v1").label == "v2"


def test_bytes_that_are_not_the_manifests_are_refused(pool, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1), "y": content(2)})
    wrong = manifest.with_digests({"y": "0" * 32})
    with pytest.raises(VerificationError, match=r"tensor 'y' of '.*/a': expected bytes of digest 0{32}, got"):
        pool.store_copy(index, wrong, "v1")
    assert pool.versions() == ()
    assert pool.size_bytes == 0


def test_a_file_cut_during_the_copy_is_reported(pool, tmp_path, monkeypatch):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    monkeypatch.setattr(segment_copy.os, "preadv", lambda *_: 0)
    with pytest.raises(ManifestError, match="its file was cut"):
        pool.store_copy(index, manifest, "v1")
    assert pool.size_bytes == 0


def test_a_taken_label_is_noticed_before_the_copy(pool, copy, monkeypatch):
    copy({"x": content(1)}, "v1")
    monkeypatch.setattr(segment_copy.os, "preadv", lambda *_: pytest.fail("copies"))
    with pytest.raises(ConfigError, match="bound to"):
        copy({"x": content(2)}, "v1")


def test_a_full_file_system_is_reported(pool, copy, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_copy.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="evict versions"):
        copy({"x": content(1)})
    assert pool.size_bytes == 0


def test_a_cold_holder_shares_nothing(pool, copy):
    first = copy({"x": content(1)}, "v1")
    paths(first)[0].unlink()
    assert read(copy({"x": content(1), "y": content(2)}, "v2").index)["x"] == content(1)
    assert not pool.warm(pool.find("v1"))


# -- staged files --------------------------------------------------------------------------------------------------------
def test_staged_tensors_become_a_version(pool):
    import torch  # here, since processes of other tests import this module

    tensors = {"w": torch.arange(5000, dtype=torch.int32)}
    with pool.staging() as directory:
        index = stage_tensors(tensors, directory)
        manifest = Manifest.from_index(index, {"w": content_digest(tensors["w"].numpy().tobytes())})
        record = pool.own(index, manifest, "v1")
        assert record.index == index
    assert read(pool.index_of("v1")) == {"w": tensors["w"].numpy().tobytes()}


def test_pages_of_what_others_have_are_given_back(pool, copy):
    first = copy({"x": content(1), "y": content(2)}, "v1")
    size = pool.size_bytes
    record = own(pool, {"x": content(1), "y": content(3), "z": content(2)}, "v2")
    assert pool.size_bytes - size <= SIZE + 2 * PAGE_BYTES
    assert set(paths(first)) < set(paths(record))
    assert read(pool.index_of("v2")) == {"x": content(1), "y": content(3), "z": content(2)}
    assert pool.warm(record)


def test_a_file_that_brings_nothing_new_goes(pool, copy):
    copy({"x": content(1)}, "v1")
    size = pool.size_bytes
    own(pool, {"other name": content(1)}, "v2")
    assert pool.size_bytes == size
    assert not list(pool.directory.glob("staging-*"))


def test_staged_files_that_nobody_owns_go(pool):
    with pool.staging() as directory:
        write(directory / "staged", {"x": content(1)})
        pool.evict(0, 0, ())
        VersionPool(pool._store, pool.directory)
        assert (directory / "staged").exists()
    assert not directory.exists()


def test_only_staged_files_are_owned(pool, tmp_path):
    for path in (tmp_path / "a", pool.directory / "b"):
        index, manifest = write(path, {"x": content(1)})
        with pytest.raises(ConfigError, match="expected a file in a directory of staging"):
            pool.own(index, manifest, "v1")
        assert path.exists()


# -- bounds --------------------------------------------------------------------------------------------------------------
def labels(records):
    return sorted(record.label for record in records)


def test_the_versions_used_longest_ago_go(pool, copy):
    for number in range(4):
        copy({"x": content(number)}, f"v{number}")
    pool.index_of("v0")
    assert labels(pool.evict(2, MUCH, ())) == ["v1", "v2"]
    assert labels(pool.versions()) == ["v0", "v3"]
    assert len(list(pool.directory.glob("segment-*"))) == 2


def test_the_budget_counts_shared_bytes_once(pool, copy):
    for number in range(4):
        copy({"x": content(9), "y": content(number)}, f"v{number}")
    budget = 3 * (SIZE // PAGE_BYTES + 3) * PAGE_BYTES
    assert labels(pool.evict(9, budget, ())) == ["v0", "v1"]
    assert pool.size_bytes <= budget
    assert read(pool.index_of("v3")) == {"x": content(9), "y": content(3)}


def test_an_older_version_never_stays_instead_of_a_newer_one(pool, copy):
    copy({"x": content(1, PAGE_BYTES)}, "old and small")
    copy({"x": content(2)}, "large")
    copy({"x": content(3, PAGE_BYTES)}, "new and small")
    assert labels(pool.evict(9, 2 * PAGE_BYTES, ())) == ["large", "old and small"]


def test_a_segment_still_used_in_part_loses_the_rest(pool, copy):
    first = copy({"x": content(1), "y": content(2), "z": content(3)}, "v1")
    second = copy({"y": content(2)}, "v2")
    before = paths(first)[0].stat()
    assert labels(pool.evict(1, MUCH, ())) == ["v1"]
    after = paths(second)[0].stat()
    assert after.st_blocks * 512 <= SIZE + 3 * PAGE_BYTES < before.st_blocks * 512
    assert after.st_mtime_ns == before.st_mtime_ns
    assert pool.warm(second)
    assert read(pool.index_of("v2")) == {"y": content(2)}


def test_protected_versions_stay(pool, copy):
    first = copy({"x": content(1)}, "v1")
    copy({"x": content(2)}, "v2")
    assert labels(pool.evict(0, 0, {first.digest})) == ["v2"]
    assert labels(pool.versions()) == ["v1"]


def test_versions_in_files_cost_nothing_and_their_files_stay(pool, copy, tmp_path):
    index, manifest = write(tmp_path / "a", {"x": content(1)})
    pool.keep(index, manifest, "files")
    copy({"x": content(2)}, "copy")
    assert labels(pool.evict(9, 0, ())) == ["copy"]
    assert labels(pool.evict(0, 0, ())) == ["files"]
    assert (tmp_path / "a").exists()
    assert pool.size_bytes == 0


def test_cold_versions_go_first(pool, copy):
    copy({"x": content(1)}, "old")
    paths(copy({"x": content(2)}, "cold"))[0].unlink()
    assert labels(pool.evict(1, MUCH, ())) == ["cold"]


def test_where_holes_cannot_be_made_whole_files_count(pool, copy, monkeypatch):
    monkeypatch.setattr(segments, "punch", lambda *_: False)
    copy({"x": content(1), "y": content(2), "z": content(3)}, "v1")
    second = copy({"y": content(2)}, "v2")
    assert labels(pool.evict(9, 2 * SIZE, ())) == ["v1", "v2"]
    assert pool.size_bytes == 0
    copy({"x": content(4)}, "v3")
    assert labels(pool.evict(9, MUCH, {second.digest})) == []


def test_pages_and_gaps():
    page = PAGE_BYTES
    assert pages_of([(5 * page, 6 * page), (0, 1), (page - 1, page + 1)]) == [(0, 2 * page), (5 * page, 6 * page)]
    assert gaps_between([(0, 2 * page), (5 * page, 6 * page)], 7 * page + 1) == [
        (2 * page, 5 * page),
        (6 * page, 8 * page),
    ]
    assert gaps_between([], page + 1) == [(0, 2 * page)]


# -- several users, and kill -9 --------------------------------------------------------------------------------------------
def test_a_directory_of_another_store_is_refused(pool, tmp_path):
    with Store(tmp_path / "another") as another, pytest.raises(ConfigError, match="expected the pool of store"):
        VersionPool(another, pool.directory)


def test_a_directory_that_others_write_is_refused(store, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="only its owner writes"):
        VersionPool(store, tmp_path / "open")


def test_whoever_waits_too_long_says_so_and_looking_up_waits_for_nobody(store, place, copy, tmp_path):
    record = copy({"x": content(1)}, "v1")
    waiting = VersionPool(store, place, lock_timeout_s=0)
    with owned.locked(place, timeout_s=0):
        VersionPool(store, place)
        assert waiting.index_of("v1") == record.index
        with pytest.raises(ConfigError, match="another process or thread has it"):
            waiting.evict(0, 0, ())
    assert labels(waiting.evict(0, 0, ())) == ["v1"]


def test_the_time_of_a_file_whose_puncher_was_killed_is_put_right(store, pool, copy):
    record = copy({"x": content(1)}, "v1")
    file = record.index.files[0]
    (pool.directory / f"punching-{file.mtime_ns}").symlink_to(file.path)
    os.utime(file.path)
    assert not pool.warm(record)
    assert VersionPool(store, pool.directory).warm(record)
    assert not list(pool.directory.glob("punching-*"))


# each line is a statement of SQLite, or an opening, removal, renaming or linking of a file
STEPS = """
import sys, sqlite3
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_version_pool import *
root, place, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
connect = sqlite3.connect
def traced(*args, **options):
    connection = connect(*args, **options)
    connection.set_trace_callback(lambda statement: print("statement", flush=True))
    return connection
sqlite3.connect = traced
EVENTS = {{"open", "os.remove", "os.rename", "os.symlink", "os.utime", "os.mkdir", "os.rmdir"}}
sys.addaudithook(lambda event, args: print(event, flush=True) if event in EVENTS else None)
chosen = random.Random(seed)
with Store(root / "store") as store:
    pool = VersionPool(store, place)
    while True:
        tensors = {{name: content(chosen.randrange(6)) for name in "abc"}}
        if chosen.random() < 0.5:
            own(pool, tensors, "")
        else:
            index, manifest = write(root / "source", tensors)
            pool.store_copy(index, manifest, "")
        pool.evict(3, MUCH, ())
"""


def test_a_killed_process_leaves_a_whole_pool(tmp_path, place):
    chosen = random.Random(3)
    code = STEPS.format(tests=os.path.dirname(__file__))
    for round_number in range(12):
        command = [sys.executable, "-c", code, str(tmp_path), str(place), str(round_number)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            for _ in range(chosen.randrange(40, 400)):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            child.stdout.read()
        assert child.returncode == -signal.SIGKILL
        with Store(tmp_path / "store") as store:
            pool = VersionPool(store, place)
            used = set()
            for record in pool.versions():
                assert pool.warm(record)
                digests = {name: content_digest(data) for name, data in read(record.index).items()}
                assert digests == {meta.name: meta.digest for meta in record.manifest.tensors}
                used |= set(paths(record))
            assert {path for path in place.rglob("*") if path.is_file()} == used
            assert {path.name for path in place.iterdir() if path.is_symlink()} == {"store"}
