"""What an owner offers, under which label, and what is left of it."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path
from one_sided import FakeOneSided

from ckpt_core import owning
from ckpt_core.errors import ConfigError, EngineError
from ckpt_core.owning import Owner


class Directory:
    """Stands in for the lease; what it was told."""

    def __init__(self):
        self.told = []
        self.replaced = False

    def offer(self, offer):
        if offer.version == "refused":
            raise EngineError("too large")
        self.told.append((offer.version, offer.digest))

    def withdraw(self, digest):
        self.told.append(("", digest))


@pytest.fixture
def library(monkeypatch):
    made = FakeOneSided(contact="here")
    monkeypatch.setattr(owning, "open_library", lambda _library, **_options: made)
    return made


@pytest.fixture
def directory(monkeypatch):
    made = Directory()

    @contextmanager
    def lease(_client, **_options):
        yield made

    monkeypatch.setattr(owning, "Lease", lease)
    return made


@pytest.fixture
def owner(library, directory):
    with Owner(host="h", directory="http://127.0.0.1:1") as made:
        yield made


def tensors(value):
    return {"a": torch.full((3, 5), value), "b": torch.tensor(value)}


def test_a_version_is_offered_until_it_is_withdrawn(owner, library, directory):
    offer = owner.publish(tensors(1.0), version="one")
    assert directory.told == [("one", offer.digest)]
    assert len(library.exposed) == 1
    owner.withdraw(offer.digest)
    assert directory.told[1:] == [("", offer.digest)]
    assert library.exposed == []
    assert owner.digests == frozenset()


def test_the_same_bytes_get_a_new_label_and_no_more_memory(owner, library, directory):
    first, again = (owner.publish(tensors(1.0), version=label) for label in ("one", "two"))
    assert first.digest == again.digest
    assert [label for label, _ in directory.told] == ["one", "two"]
    assert len(library.exposed) == 1


def test_what_the_directory_refuses_is_told(owner):
    with pytest.raises(EngineError, match="too large"):
        owner.publish(tensors(2.0), version="refused")


def test_copies_of_tensors_go_with_the_owner(library, directory, monkeypatch, tmp_path):
    monkeypatch.setenv("CKPT_SHM_DIR", str(tmp_path))
    with Owner(host="h", max_bytes_per_s=1e6) as owner:
        offer = owner.publish(tensors(3.0))
        assert offer.max_bytes_per_s == 1e6
        assert offer.version == offer.digest[:12]
        assert [*tmp_path.iterdir()] != []
    assert [*tmp_path.iterdir()] == []
    assert library.exposed == []


def test_nics_that_are_not_there(monkeypatch):
    monkeypatch.setenv("CKPT_NICS", "=nothing-of-that-name")
    with pytest.raises(ConfigError, match="CKPT_NICS"):
        Owner(host="h")
