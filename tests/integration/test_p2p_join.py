"""Engines that join read their weights out of the memory of real owner processes, over real Mooncake and NIXL."""

import json
import os
import signal
from contextlib import ExitStack

import pytest
from pool_owners import Owners

from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.reference.worker import Worker, WorkerOptions
from ckpt_core import Outcome, Peers, UpdateAborted
from ckpt_core.config import VerifyLevel
from ckpt_core.errors import ConfigError, PeerLost
from ckpt_core.metrics import Stage
from ckpt_core.transport.p2p.base import Library
from ckpt_core.verify import fingerprint

pytestmark = pytest.mark.timeout(300)
LIBRARIES = pytest.mark.parametrize("library", list(Library), ids=lambda library: library.value)
START_S = 60.0


@pytest.fixture
def owners(tmp_path):
    with ExitStack() as stack:
        yield Owners(stack, tmp_path)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 13 MB: enough for many chunks."""
    return make_tiny(tmp_path_factory.mktemp("large") / "m", seed=3, intermediate=12000, vocab=4000)


@LIBRARIES
def test_two_ranks_join_and_equal_a_fresh_start(checkpoint_of, owners, start_server, updater_of, library):
    checkpoint = checkpoint_of("qwen3_moe")
    files = owners.start(checkpoint, library)
    server = start_server(checkpoint, tp=2, load_format="dummy")
    fresh = start_server(checkpoint, tp=2)
    report = updater_of(server).update(Peers(offers=files), version="theirs")
    assert report.outcome is Outcome.COMMITTED
    assert server.status()["version"] == "theirs"
    assert server.generate([5, 17, 42, 8])["text"] == fresh.generate([5, 17, 42, 8])["text"]
    assert report.digest == json.loads(files[0].read_bytes())["digest"]
    assert sum(agent.network_in_bytes for agent in report.agents) >= report.size_bytes


@LIBRARIES
def test_an_owner_is_killed_in_the_middle(large, owners, updater_of, kill, library):
    files = owners.start(large, library, count=3)
    worker = Worker(large, WorkerOptions(load_format="dummy"))
    killed = []

    def on_progress(stage, done, _total):
        if stage is Stage.TRANSFER and done and not killed:
            killed.append(kill(owners.processes[files[1]].pid))

    updater = updater_of(worker, on_progress=on_progress, ring_bytes=1 << 20, bucket_bytes=1 << 18)
    updater.update(Peers(offers=files, max_bytes_per_s=8e6))
    assert killed
    assert fingerprint(worker.live()) == fingerprint(Worker(large).live())


@LIBRARIES
def test_all_owners_are_gone_and_nothing_is_touched(large, owners, updater_of, kill, library):
    files = owners.start(large, library, count=1)
    kill(owners.processes[files[0]].pid)
    worker = Worker(large, WorkerOptions(load_format="dummy"))
    updater = updater_of(worker)
    with pytest.raises(UpdateAborted) as caught:
        updater.update(Peers(offers=files))
    assert isinstance(caught.value.causes[0], PeerLost)
    assert caught.value.outcome is Outcome.CLEAN
    updater.update(large)
    assert fingerprint(worker.live()) == fingerprint(Worker(large).live())


def test_an_owner_ends_when_it_is_told(checkpoint_of, owners):
    (file,) = owners.start(checkpoint_of(), Library.MOONCAKE, count=1)
    process = owners.processes[file]
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(START_S) == 0


def test_ranks_cannot_compare_what_agents_read_elsewhere(checkpoint_of, owners, updater_of):
    files = owners.start(checkpoint_of(), Library.NIXL, count=1)
    with pytest.raises(ConfigError, match="by agents only"):
        updater_of(Worker(checkpoint_of()), verify=VerifyLevel.LIVE).update(Peers(offers=files))
