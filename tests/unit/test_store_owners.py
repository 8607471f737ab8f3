"""Leases, later lives at one address, and what the directory knows when it was started again."""

import sqlite3

import pytest

from ckpt_core.errors import ConfigError, EngineStateError
from ckpt_core.membership import OwnerEntry
from ckpt_core.store import STORE_FILE, Store
from ckpt_core.store_file import SCHEMA_VERSION, StoreFile
from ckpt_core.store_owners import OwnerTable


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(tmp_path, clock):
    file = StoreFile(tmp_path / "store.sqlite3", timeout_s=5.0)
    yield OwnerTable(file, clock=clock)
    file.close()


def entry(instance, *, address="", born_at=1.0, lease_s=10.0):
    return OwnerEntry(
        instance=instance, name=instance, address=address or f"{instance}/o", born_at=born_at, lease_s=lease_s
    )


def offer(table, instance, digest="d1", label="one"):
    table.offer(instance, digest, label, f"{instance} {digest}".encode())


def test_an_owner_and_its_offer_are_there_until_the_lease_runs_out(table, clock):
    assert table.put(entry("a")).offers == ()
    offer(table, "a")
    clock.now_s += 9.0
    assert table.put(entry("a")).offers == ("d1",)
    clock.now_s += 9.0
    assert table.offering("one").owners == ("a",)
    clock.now_s += 2.0
    assert table.rows() == ()
    with pytest.raises(ConfigError, match="nothing at all"):
        table.offering("one")
    with pytest.raises(ConfigError, match="register it first"):
        offer(table, "a")


def test_a_directory_that_was_away_lets_owners_come_back(table, clock):
    table.put(entry("a"))
    offer(table, "a")
    clock.now_s += 60.0
    table.grant_all()
    assert table.offering("one").owners == ("a",)
    clock.now_s += 11.0
    assert table.rows() == ()


def test_every_change_and_nothing_else_changes_the_epoch(table, clock):
    seen = [table.epoch()]

    def changes(call, *args):
        call(*args)
        seen.append(table.epoch())
        return seen[-1] != seen[-2]

    assert changes(table.put, entry("a"))
    assert not changes(table.put, entry("a"))
    assert changes(offer, table, "a")
    assert changes(table.withdraw, "a", "d1")
    assert not changes(table.withdraw, "a", "d1")
    assert changes(table.put, entry("b", lease_s=100.0))
    assert changes(table.leave, "a")
    assert not changes(table.leave, "a")
    clock.now_s += 101.0
    assert table.epoch() == seen[-1] + 1


def test_a_later_life_at_an_address_takes_the_place_of_the_one_before(table):
    table.put(entry("first", address="here", born_at=1.0))
    offer(table, "first")
    table.put(entry("second", address="here", born_at=2.0))
    assert [row.entry.instance for row in table.rows()] == ["second"]
    with pytest.raises(ConfigError, match="does not offer"):
        table.offered("first", "d1")
    with pytest.raises(EngineStateError, match="later life"):
        table.put(entry("first", address="here", born_at=1.0))


def test_versions_by_digest_label_and_beginning(table):
    for name in "ab":
        table.put(entry(name))
    offer(table, "a", "d1abc", "one")
    offer(table, "b", "d1abc", "one")
    offer(table, "b", "d2abc", "two")
    assert table.offering("one").owners == ("a", "b")
    assert table.offering("d2").version == "two"
    assert table.offering("").digest == "d2abc"
    assert table.offered("b", "d2abc") == b"b d2abc"
    with pytest.raises(ConfigError, match=r"several.*d1abc \(one\)"):
        table.offering("d")
    with pytest.raises(ConfigError, match="nobody who offers it"):
        table.offering("three")


def test_all_of_it_survives_the_process(tmp_path):
    with Store(tmp_path) as store:
        store.owners.put(entry("a", lease_s=1000.0))
        offer(store.owners, "a")
        epoch = store.owners.epoch()
    with Store(tmp_path) as store:
        assert store.owners.offering("one").owners == ("a",)
        assert store.owners.epoch() == epoch


def test_a_store_of_the_release_before_gets_the_table(tmp_path):
    with Store(tmp_path) as store:
        identity = store.identity
    with sqlite3.connect(tmp_path / STORE_FILE) as old:
        for name in ("offers", "owners", "membership"):
            old.execute(f"DROP TABLE {name}")
        old.execute("PRAGMA user_version = 1")
    with Store(tmp_path) as store:
        assert store.identity == identity
        assert store.owners.put(entry("a")).offers == ()
    with sqlite3.connect(tmp_path / STORE_FILE) as now:
        assert now.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
