"""What the fleet runs, and what those who join change about that: nothing."""

import pytest

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus
from ckpt_core.directory import Directory
from ckpt_core.errors import ConfigError
from ckpt_core.membership import OwnerEntry
from ckpt_core.readiness import not_ready
from ckpt_core.store import Store
from ckpt_core.store_records import EngineRecord


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as made:
        yield made


@pytest.fixture
def directory(store):
    return Directory(store)


def engine(url, digest, at, update_id="u"):
    return EngineRecord(
        url=url,
        engine="reference",
        instance_id=url,
        digest=digest,
        version=digest.upper(),
        update_id=update_id,
        committed_at=at,
    )


def late(store):
    """Engines that a router would send nothing to."""
    known = {record.url: record for record in store.engines()}
    status = {
        url: EndpointStatus(
            state=EndpointState.SERVING, engine="reference", world_size=1, device_kind=DeviceKind.CPU, instance_id=url
        )
        for url in known
    }
    return set(not_ready(status, known))


def test_who_joins_late_is_not_newer(directory, store):
    store.put_engine(engine("a", "old", 100.0))
    store.put_engine(engine("a", "new", 200.0))
    directory.joined([engine("b", "new", 300.0)])
    assert directory.fleet().digest == "new"
    assert late(store) == set()
    directory.joined([engine("c", "old", 400.0)])
    assert directory.fleet().digest == "new"
    assert late(store) == {"c"}


def test_an_engine_that_its_own_controller_wrote_down_is_no_update_of_the_fleet(directory, store):
    """Where it joins on the host of the directory, both write into one store."""
    store.put_engine(engine("a", "new", 200.0))
    store.put_engine(engine("b", "old", 300.0))
    directory.joined([engine("b", "old", 300.0)])
    assert directory.fleet().digest == "new"
    assert late(store) == {"b"}


def test_without_a_controller_those_who_join_are_all_there_is(directory, store):
    directory.joined([engine("a", "one", 100.0)])
    assert directory.fleet().digest == ""
    directory.joined([engine("b", "two", 200.0)])
    assert late(store) == {"a"}
    directory.joined([engine("a", "two", 300.0)])
    assert late(store) == set()


@pytest.mark.parametrize(
    "change", [{"lease_s": 0.0}, {"lease_s": 1e9}, {"name": ""}, {"address": "x" * 201}, {"lease_s": float("nan")}]
)
def test_owners_out_of_bounds(directory, change):
    fields = {"instance": "i", "name": "n", "address": "a", "born_at": 1.0, "lease_s": 5.0} | change
    with pytest.raises(ConfigError):
        directory.register(OwnerEntry(**fields))
