"""The store: records survive, labels stay bound, several users share it, and kill -9 leaves it whole."""

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import msgspec
import pytest

from ckpt_core.dtypes import DType
from ckpt_core.errors import ConfigError, ManifestError, Outcome
from ckpt_core.manifest import Manifest, TensorMeta, content_digest
from ckpt_core.process import ProcessMark
from ckpt_core.source import Extent, SourceFile, SourceIndex
from ckpt_core.store import STORE_FILE, EngineRecord, Store, UpdateEndpoint, UpdateRecord, VersionRecord

CONTROLLER = ProcessMark.here()


def version(content, label="", created_at=1.0):
    data = content.encode()
    meta = TensorMeta(name="w", dtype=DType.U8, shape=(len(data),), digest=content_digest(data))
    file = SourceFile(path=f"/models/{content}", size_bytes=len(data), mtime_ns=1, inode=2, device=3)
    extent = Extent(name="w", dtype=DType.U8, shape=(len(data),), file=0, offset_bytes=0, size_bytes=len(data))
    record = VersionRecord.of(SourceIndex(files=(file,), extents=(extent,)), Manifest(tensors=(meta,)), label)
    return replace(record, created_at=created_at, used_at=created_at)


def update(update_id, new_digest="n" * 32, old_digest="o" * 32):
    endpoint = UpdateEndpoint(url="http://a", engine="vllm", instance_id="1", old_digest=old_digest)
    return UpdateRecord(
        update_id=update_id,
        state="planned",
        controller=CONTROLLER,
        endpoints=(endpoint,),
        new_digest=new_digest,
        version="v2",
        started_at=2.0,
    )


def engine(url="http://a", update_id="u1", digest="n" * 32):
    return EngineRecord(
        url=url,
        engine="vllm",
        instance_id="1",
        digest=digest,
        version="v2",
        update_id=update_id,
        fingerprints=("aa", "bb"),
        committed_at=3.0,
    )


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


# -- the file ------------------------------------------------------------------------------------------------------
def test_the_directory_and_its_files_are_private(tmp_path, store):
    store.put_engine(engine())
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    files = list((tmp_path / "store").iterdir())
    assert {file.name for file in files} >= {STORE_FILE, f"{STORE_FILE}-wal"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_write_is_refused(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(ConfigError, match=r"only its owner writes.*chmod 700"):
        Store(tmp_path / "open")
    assert list((tmp_path / "open").iterdir()) == []


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="expected a directory of uid"):
        Store(tmp_path / "theirs")


def test_a_file_that_others_read_is_refused(tmp_path):
    Store(tmp_path).close()
    (tmp_path / STORE_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="expected a file of mode 600"):
        Store(tmp_path)


def test_a_link_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / STORE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="expected a file of mode 600"):
        Store(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def change(path, statement):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_newer_schema_is_refused(tmp_path):
    Store(tmp_path).close()
    change(tmp_path / STORE_FILE, "PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="expected schema 2 or older, got 99: a later release made it"):
        Store(tmp_path)


def test_another_database_and_another_file_are_refused(tmp_path):
    change(tmp_path / STORE_FILE, "CREATE TABLE mine (x)")
    (tmp_path / STORE_FILE).chmod(0o600)
    with pytest.raises(ConfigError, match="got another database"):
        Store(tmp_path)
    (tmp_path / STORE_FILE).write_bytes(b"no database at all " * 300)
    with pytest.raises(ConfigError, match="file is not a database"):
        Store(tmp_path)


def test_an_open_that_was_killed_before_the_schema_is_finished_by_the_next(tmp_path):
    (tmp_path / STORE_FILE).touch(mode=0o600)
    with Store(tmp_path) as opened:
        assert opened.versions() == ()


def test_a_closed_store_says_so_and_closes_twice(tmp_path):
    opened = Store(tmp_path)
    opened.close()
    opened.close()
    with pytest.raises(ConfigError, match="closed"):
        opened.versions()


def test_a_writer_that_does_not_end_is_reported(tmp_path):
    with Store(tmp_path, timeout_s=0.01) as opened:
        other = sqlite3.connect(tmp_path / STORE_FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigError, match="locked"):
            opened.put_engine(engine())
        other.close()
        opened.put_engine(engine())


# -- versions ------------------------------------------------------------------------------------------------------
def test_versions_survive_and_come_newest_first(tmp_path, store):
    records = [version("one", "v1", 1.0), version("two", "v2", 2.0), version("three", "", 3.0)]
    for record in records:
        store.put_version(record)
    with Store(tmp_path / "store") as other:
        assert other.identity == store.identity
        assert other.versions() == tuple(reversed(records))
        assert other.versions()[0].tensors == 1
        assert other.versions()[0].size_bytes == 5


def test_a_version_is_found_by_label_digest_and_prefix(store):
    one, two = version("one", "v1"), version("two", "v2")
    store.put_version(one)
    store.put_version(two)
    assert store.version("v1") == store.version(one.digest) == store.version(one.digest[:6]) == one
    with pytest.raises(ConfigError, match=rf"got none of that name.*{two.digest} \(v2\)"):
        store.version("v3")
    with pytest.raises(ConfigError, match="got none"):
        store.version("")


def test_a_prefix_of_several_lists_them(store):
    records = [version(str(number)) for number in range(17)]
    for record in records:
        store.put_version(record)
    first = [record.digest[0] for record in records]
    prefix = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(ConfigError, match="got several") as caught:
        store.version(prefix)
    fitting = [record.digest for record in records if record.digest.startswith(prefix)]
    assert all(digest in str(caught.value) for digest in fitting)


def test_a_digest_is_found_even_where_a_label_looks_like_it(store):
    one = version("one")
    store.put_version(one)
    store.put_version(version("two", label=one.digest))
    assert store.version(one.digest) == one


def test_a_label_stays_with_its_digest(store):
    one, two = version("one", "v1"), version("two", "v1")
    store.put_version(one)
    with pytest.raises(ConfigError, match=f"of version {two.digest}, got it bound to {one.digest}"):
        store.put_version(two)
    with pytest.raises(ConfigError, match="bound to"):
        store.check_label("v1", two.digest)
    assert store.versions() == (one,)
    store.put_version(one)
    store.forget_version(one.digest)
    store.put_version(two)
    assert store.version("v1") == two


def test_a_version_may_get_more_labels_and_another_place(store):
    one = version("one", "v1", 1.0)
    store.put_version(one)
    file = replace(one.index.files[0], path="/elsewhere")
    moved = replace(one, label="best", index=replace(one.index, files=(file,)), created_at=5.0, used_at=5.0)
    store.put_version(moved)
    assert store.version("v1") == store.version("best") == replace(moved, created_at=1.0)
    store.put_version(replace(moved, label=""))
    assert store.version("v1").label == "best"


def test_a_version_must_have_the_digest_of_its_manifest(store):
    with pytest.raises(ManifestError, match="expected the manifest's digest"):
        store.put_version(replace(version("one"), digest="0" * 32))


def test_touching_moves_only_forward(store):
    one = version("one", created_at=1.0)
    store.put_version(one)
    store.touch_version(one.digest)
    later = store.version(one.digest)
    assert later.used_at > later.created_at == 1.0
    store.put_version(one)
    assert store.version(one.digest) == later


# -- engines and updates ---------------------------------------------------------------------------------------------
def test_engines_are_kept_by_url(store):
    store.put_engine(engine("http://b"))
    store.put_engine(engine("http://a"))
    again = msgspec.structs.replace(engine("http://a"), instance_id="2")
    store.put_engine(again)
    assert store.engine("http://a") == again
    assert [record.url for record in store.engines()] == ["http://a", "http://b"]
    store.forget_engine("http://a")
    assert store.engine("http://a") is None


def test_an_update_from_begin_to_end(store):
    store.begin_update(update("u1"))
    assert store.in_flight() == (update("u1"),)
    store.move_update("u1", "loading")
    assert store.update("u1").state == "loading"
    store.end_update("u1", {"http://a": Outcome.RESTORED})
    ended = store.update("u1")
    assert ended.ended_at is not None
    assert ended.outcomes == {"http://a": Outcome.RESTORED}
    assert ended.controller == CONTROLLER
    assert store.in_flight() == ()


def test_a_commit_writes_engines_and_end_together(store):
    store.begin_update(update("u1"))
    store.commit_update("u1", [engine("http://a"), engine("http://b")])
    assert store.update("u1").state == "committed"
    assert store.update("u1").outcomes == {"http://a": Outcome.COMMITTED, "http://b": Outcome.COMMITTED}
    assert len(store.engines()) == 2


def test_only_an_update_in_flight_changes(store):
    store.begin_update(update("u1"))
    store.commit_update("u1", [engine()])
    calls = [
        lambda name: store.move_update(name, "loading"),
        lambda name: store.end_update(name, {}),
        lambda name: store.commit_update(name, [engine("http://new")]),
    ]
    for call in calls:
        for name in ("u1", "unknown"):
            with pytest.raises(ConfigError, match="expected in flight"):
                call(name)
    assert store.engine("http://new") is None
    with pytest.raises(ConfigError, match="got no such one"):
        store.update("unknown")


def test_names_of_updates_are_used_once(store):
    store.begin_update(update("u1"))
    with pytest.raises(ConfigError, match="expected a new name"):
        store.begin_update(update("u1"))
    with pytest.raises(ConfigError, match="one that ended"):
        store.begin_update(msgspec.structs.replace(update("u2"), ended_at=1.0))


def test_the_last_updates_come_first(store):
    for number in range(4):
        store.begin_update(update(f"u{number}"))
    store.end_update("u2", {})
    assert [record.update_id for record in store.updates(2)] == ["u3", "u2"]
    assert [record.update_id for record in store.in_flight()] == ["u0", "u1", "u3"]


def test_digests_in_use(store):
    store.begin_update(update("u1", new_digest="b" * 32, old_digest="a" * 32))
    store.begin_update(update("u2", new_digest="c" * 32, old_digest=""))
    store.begin_update(update("u3", new_digest="d" * 32))
    store.end_update("u3", {})
    store.put_engine(engine(digest="e" * 32))
    assert store.digests_in_use() == {"a" * 32, "b" * 32, "c" * 32, "e" * 32}


# -- several users ---------------------------------------------------------------------------------------------------
def test_threads_share_one_store(store):
    def run(number):
        for step in range(10):
            store.begin_update(update(f"{number}-{step}"))
            store.commit_update(f"{number}-{step}", [engine(f"http://{number}", update_id=str(step))])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.updates(100)) == 40
    assert [record.update_id for record in store.engines()] == ["9"] * 4


PRELUDE = """
import sys, sqlite3
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import *
directory, name = Path(sys.argv[1]), sys.argv[2]
"""

WRITER = """
with Store(directory) as store:
    for step in range(20):
        store.begin_update(update(f"{name}-{step}"))
        store.commit_update(f"{name}-{step}", [engine(f"http://{name}", update_id=str(step))])
"""

# prints a line before each statement that SQLite runs, and one after each call that returned
STEPS = """
connect = sqlite3.connect
def traced(*args, **options):
    connection = connect(*args, **options)
    connection.set_trace_callback(lambda statement: print("statement", flush=True))
    return connection
sqlite3.connect = traced
with Store(directory) as store:
    for step in range(1000):
        update_id = f"{name}-{step}"
        store.put_version(version(update_id, update_id))
        store.begin_update(update(update_id))
        print("done", update_id, "planned", flush=True)
        store.move_update(update_id, "loading")
        print("done", update_id, "loading", flush=True)
        store.commit_update(update_id, [engine(f"http://{rank}", update_id) for rank in range(3)])
        print("done", update_id, "committed", flush=True)
"""


def start(program, *args, **options):
    code = PRELUDE.format(tests=os.path.dirname(__file__)) + program
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], text=True, **options)


def test_processes_that_start_together_share_one_store(tmp_path):
    children = [start(WRITER, tmp_path / "store", name) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]
    with Store(tmp_path / "store") as store:
        assert len(store.updates(100)) == 40
        assert [record.update_id for record in store.engines()] == ["19", "19"]


def killed_after(lines, program, *args):
    """What a process printed until it was killed after so many lines."""
    with start(program, *args, stdout=subprocess.PIPE) as child:
        printed = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    return printed


def test_a_killed_process_leaves_a_whole_store(tmp_path):
    chosen = random.Random(7)
    order = ["planned", "loading", "committed"]
    cut = set()  # updates that a killed process left in flight
    for number in range(20):
        printed = killed_after(chosen.randrange(1, 80), STEPS, tmp_path / "store", number)
        with Store(tmp_path / "store") as store:
            for _, update_id, state in (
                line.split() for line in printed if line.startswith("done") and line[-1] == "\n"
            ):
                assert order.index(store.update(update_id).state) >= order.index(state)
            whole = [record for record in store.updates(1000) if record.update_id not in cut]
            for record in whole:
                assert (record.state == "committed") == (record.ended_at is not None)
                assert store.version(record.update_id).label == record.update_id
            committed = [record.update_id for record in whole if record.ended_at is not None]
            assert [record.update_id for record in store.engines()] == (committed[:1] * 3)
            assert len(store.in_flight()) <= 1
            for record in store.in_flight():
                store.end_update(record.update_id, {})
                cut.add(record.update_id)
        check = sqlite3.connect(tmp_path / "store" / STORE_FILE)
        assert check.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert check.execute("PRAGMA foreign_key_check").fetchall() == []
        check.close()
