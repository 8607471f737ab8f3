"""Benches of the conformance kit on the stand-in, for tests that go beyond its checks."""

from __future__ import annotations

import pytest

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.checkpoints import CheckpointStore
from ckpt_conformance.kept_server import KeptServer
from ckpt_conformance.levels import ModelKind
from ckpt_trtllm.harness import TrtllmHarness


@pytest.fixture(scope="session")
def stand_in():
    return TrtllmHarness(stand_in=True)


@pytest.fixture(scope="session")
def store(stand_in, tmp_path_factory):
    return CheckpointStore(stand_in, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def bench_of(stand_in, store, request):
    """A bench by kind of model; closed after the test."""

    def make(kind=ModelKind.PLAIN):
        bench = Bench(stand_in, stand_in.plugin(), kind, store, KeptServer())
        request.addfinalizer(bench.resources.close)
        return bench

    return make


@pytest.fixture
def bench(bench_of):
    return bench_of()
