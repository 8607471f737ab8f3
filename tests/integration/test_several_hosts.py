"""Engines on four hosts (network namespaces with links of their own): bytes on the wires, right weights, and deaths.

All of it is real but the machine: the hosts share its processors and its memory.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import psutil
import pytest

from ckpt_conformance import namespaces
from ckpt_conformance.cluster import EngineCluster
from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core import Outcome, Target, Undo, UpdateAborted, UpdateConfig, Updater
from ckpt_core.config import Reading, VerifyLevel
from ckpt_core.metrics import Stage

SHAPE = {"hidden": 384, "heads": 12, "kv_heads": 12, "head_dim": 32, "intermediate": 1152, "layers": 3}
MBIT_S = 100
SOON_S = 20.0
VANISHED_S = 90.0  # keep-alive (13 s), what ranks of that host say no more (30 s), and two deadlines
HEADERS = 1.05  # bytes on a wire, over those that were needed

pytestmark = pytest.mark.skipif(bool(why := namespaces.refusal()), reason=why)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """The cluster of this module stays over its tests; what it leaves is looked at when it ends."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    first = make_tiny(tmp_path_factory.mktemp("a"), seed=1, **SHAPE)
    return first, perturb(first, tmp_path_factory.mktemp("b") / "b", seed=2)


@pytest.fixture(scope="module")
def fresh(models):
    """Live digests and greedy tokens of an engine that started on the second model, by its degree."""
    known = {}

    def fresh(tp):
        if tp not in known:
            with ReferenceServer(models[1], tp=tp) as server:
                known[tp] = server.live_digests(), tokens(server)
        return known[tp]

    return fresh


@pytest.fixture(scope="module", params=[2, 4], ids=lambda tp: f"tp{tp}")
def cluster(request, models, roots, tmp_path_factory):
    """Hosts and engines on the first model; with `tp` and `servers`."""
    before = set(left(roots))
    with EngineCluster(tmp_path_factory.mktemp("keys") / "keys", mbit_s=MBIT_S) as cluster:
        cluster.tp = request.param
        cluster.servers = cluster.engines(models[0], tp=cluster.tp)
        yield cluster
    assert set(left(roots)) <= before


def left(roots):
    """Shared memory, sockets and agents of this run."""
    memory, sockets = roots
    agents = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        mine = (process.info["environ"] or {}).get("CKPT_SHM_DIR") == str(memory)
        if mine and "ckpt_core.agent" in (process.info["cmdline"] or []):
            agents.append(process.pid)
    return [
        *(path for path in memory.iterdir() if not path.name.startswith("ckpt-versions-")),
        *(path for path in sockets.iterdir() if not path.name.startswith("ckpt-locks-")),
        *agents,
    ]


def tokens(server):
    return server.generate([5, 17, 42, 8], 16, ignore_eos=True)["token_ids"]


@pytest.fixture
def updater_of():
    with ExitStack() as stack:

        def updater_of(cluster, *, reading=Reading.STRIPED, on_progress=None, **options):
            config = UpdateConfig(**{"ring_bytes": 1 << 20, "transfer_timeout_s": 60.0, "undo": Undo.NONE} | options)
            targets = [Target(engine="reference", url=server.url) for server in cluster.servers]
            members = cluster.membership(reading)
            return stack.enter_context(Updater(targets, config=config, cluster=members, on_progress=on_progress))

        yield updater_of


def expect_second(cluster, fresh):
    digests, answer = fresh(cluster.tp)
    for server in cluster.servers:
        assert server.live_digests() == digests
        assert tokens(server) == answer


def test_weights_equal_a_fresh_start_and_no_byte_enters_a_host_twice(cluster, updater_of, models, fresh):
    updater = updater_of(cluster)
    updater.update(models[1])  # by the engine's loader: it takes whole tensors
    expect_second(cluster, fresh)
    updater.update(models[0])
    before = [host.bytes_in() for host in cluster.net.hosts]
    report = updater.update(models[1])  # known by now: only slices
    came_in = [host.bytes_in() - earlier for host, earlier in zip(cluster.net.hosts, before, strict=True)]
    expect_second(cluster, fresh)
    assert len(report.hosts) == len(cluster.net.hosts)
    for host, on_the_wire in zip(report.hosts, came_in, strict=True):
        assert host.lacked_bytes <= host.network_in_bytes <= on_the_wire <= HEADERS * host.lacked_bytes
    hosts_an_engine = cluster.tp // 2
    share = 0.75 / hosts_an_engine  # a quarter of what a host needs it has read itself
    assert sum(host.lacked_bytes for host in report.hosts) == pytest.approx(4 * share * report.size_bytes, rel=0.05)
    assert sum(host.network_out_bytes for host in report.hosts) == sum(host.network_in_bytes for host in report.hosts)
    assert report.predicted is not None
    assert report.predicted.seconds >= report.predicted.lower_bound_s > 0


def test_where_all_hosts_read_nothing_goes_between_them(cluster, updater_of, models, fresh):
    report = updater_of(cluster, reading=Reading.EVERYWHERE).update(models[1])
    assert [host.network_in_bytes for host in report.hosts] == [0] * 4
    expect_second(cluster, fresh)


@pytest.mark.parametrize("level", [VerifyLevel.ARRIVAL, VerifyLevel.LIVE], ids=lambda level: level.value)
def test_what_arrives_or_lives_is_compared_on_every_host(cluster, updater_of, models, fresh, level):
    report = updater_of(cluster, verify=level).update(models[1])
    assert report.verified in ("arrival", level.value)
    compared = [rank.stats.digested_bytes + rank.stats.live_bytes for rank in report.ranks]
    assert all(0 < size <= rank.stats.received_bytes for size, rank in zip(compared, report.ranks, strict=True))
    expect_second(cluster, fresh)


def agents_of(service):
    return psutil.Process(service.pid).children()


def in_the_middle(act):
    """Progress of an update that acts once, when a rank has got a part."""
    done = []

    def on_progress(stage, size, total):
        if stage is Stage.TRANSFER and 0 < size < total and not done:
            done.append(size)
            act()

    on_progress.done = done
    return on_progress


def test_a_killed_agent_ends_the_update_and_the_next_one_works(cluster, updater_of, models, fresh):
    meanwhile = in_the_middle(agents_of(cluster.services[3])[0].kill)
    updater = updater_of(cluster, on_progress=meanwhile, replay=False)
    start = time.monotonic()
    with pytest.raises(UpdateAborted) as caught:
        updater.update(models[0])
    assert meanwhile.done
    assert time.monotonic() - start < SOON_S
    assert caught.value.outcome is Outcome.POISONED
    for server in cluster.servers:
        assert server.status()["state"] == "poisoned"
    assert updater.update(models[1]).outcome is Outcome.COMMITTED
    expect_second(cluster, fresh)


def test_a_killed_controller_leaves_no_engine_that_answers_and_the_next_one_mends_them(
    cluster, updater_of, models, fresh, eventually
):
    endpoints = [f"--endpoint={server.url}" for server in cluster.servers]
    command = [
        sys.executable,
        "-m",
        "ckpt_core",
        "update",
        str(models[0]),
        "--engine=reference",
        *endpoints,
        "--no-replay",
    ]
    members = [f"--cluster={cluster.controller_file}", "--hosts=4", "--reading=striped"]
    controller = subprocess.Popen([*command, *members])
    try:
        eventually(lambda: any(server.status()["state"] == "updating" for server in cluster.servers), "an update")
        before = [host.bytes_in() for host in cluster.net.hosts]
        eventually(lambda: cluster.net.hosts[0].bytes_in() - before[0] > 1 << 20, "bytes on the way")
        os.kill(controller.pid, signal.SIGKILL)
    finally:
        controller.kill()
        controller.wait()
    eventually(
        lambda: all(server.status()["state"] != "updating" for server in cluster.servers),
        "ranks notice",
        timeout_s=60.0,
    )
    for server in cluster.servers:
        server.post("/resume")
        assert server.client.post("/generate", json={"prompt_token_ids": [5], "max_tokens": 1}).status_code in (
            409,
            503,
        )
    assert updater_of(cluster).update(models[1]).outcome is Outcome.COMMITTED
    expect_second(cluster, fresh)


def test_a_host_that_vanishes_ends_the_update_and_mends_when_it_is_back(cluster, updater_of, models, fresh, eventually):
    if cluster.tp > 2:
        pytest.skip("an engine over several hosts does not outlive one of them")
    gone = cluster.net.hosts[1]
    meanwhile = in_the_middle(gone.cut_off)
    with_deadlines = {"replay": False, "silence_timeout_s": 5.0, "commit_timeout_s": 5.0}
    updater = updater_of(cluster, on_progress=meanwhile, **with_deadlines)
    start = time.monotonic()
    try:
        with pytest.raises(UpdateAborted) as caught:
            updater.update(models[0])
        assert meanwhile.done
        assert time.monotonic() - start < VANISHED_S
        assert caught.value.outcome is Outcome.POISONED
        assert any(gone.address in str(cause) for cause in caught.value.causes)
    finally:
        gone.connect()
        updater.__exit__(None, None, None)  # one controller at a time
    for server in cluster.servers:
        eventually(
            lambda server=server: server.status()["state"] == "poisoned", "its ranks noticed, too", timeout_s=60.0
        )
    updater_of(cluster).update(models[1])
    expect_second(cluster, fresh)


def test_a_host_without_engines_can_be_the_source(cluster, updater_of, models, fresh):
    cluster.start_agents_here()
    report = updater_of(cluster, reading=Reading.HERE).update(models[1])
    assert sorted(host.network_in_bytes > 0 for host in report.hosts) == [False, True, True, True, True]
    here = max(report.hosts, key=lambda host: host.network_out_bytes - host.network_in_bytes)
    # the source sends each byte once, however many hosts take it
    assert here.network_out_bytes == pytest.approx(report.size_bytes, rel=0.05)
    expect_second(cluster, fresh)


def test_a_killed_rank_ends_the_update_of_all(cluster, updater_of, models):
    def kill_a_rank():
        with suppress(psutil.NoSuchProcess):
            psutil.Process(cluster.servers[-1].rank_pids[-1]).kill()

    updater = updater_of(cluster, on_progress=in_the_middle(kill_a_rank), replay=False)
    start = time.monotonic()
    with pytest.raises(UpdateAborted) as caught:
        updater.update(models[0])
    assert time.monotonic() - start < SOON_S
    assert caught.value.outcome is Outcome.POISONED
