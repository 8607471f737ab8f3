"""One checkpoint into a vLLM and an SGLang server in one update: both committed, or neither resumed; from files and from owners.

The servers run in the environments of their engines, the update in the plain one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from cases import Case, Fresh, make_checkpoints
from deployments import Deployment, answers_of, start_server
from pool_owners import CKPT, Owners, join_arguments

from ckpt_core import Outcome, Undo, UpdateAborted
from ckpt_core.contract import EndpointState
from ckpt_core.errors import PeerLost
from ckpt_core.transport.p2p.base import Library

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("vllm", "sglang")
CASE = Case(model="llama", tp=1)
UPDATE_TIMEOUT_S, POLL_S = 120, 0.05


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both started on checkpoint A from disk: what they say then is what they must say whenever they are back on A."""
    checkpoints = make_checkpoints(CASE.model, tmp_path_factory.mktemp("both"), ROOT / ".cache")
    with ExitStack() as stack, ThreadPoolExecutor(len(ENGINES)) as threads:

        def start(engine):
            python = ROOT / f".venv-{engine}" / "bin" / "python"
            assert python.exists(), f"{python} is missing: make venv-{engine}"
            server, client = start_server(
                engine, stack.enter_context(ExitStack()), checkpoints.a, tp=CASE.tp, python=str(python)
            )
            says = answers_of(client, CASE, checkpoints)
            return Deployment(
                engine=engine,
                case=CASE,
                server=server,
                client=client,
                checkpoints=checkpoints,
                fresh=Fresh(tokens={"a": says}),
                babble=[],
            )

        yield tuple(threads.map(start, ENGINES))


def assert_back_on_a(pair, version):
    for deployment in pair:
        assert deployment.answers() == deployment.fresh.tokens["a"]
        status = deployment.status()
        assert (status.state, status.version) == (EndpointState.SERVING, version)


def run_ckpt(*arguments):
    """As an operator types it."""
    ckpt = Path(sys.executable).parent / "ckpt"
    command = [ckpt, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=UPDATE_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def endpoints_of(pair):
    return [f"{deployment.engine}={deployment.url}" for deployment in pair]


def move(pair, which, directory):
    """Both to a checkpoint in files; the report."""
    report = directory / f"{which}.json"
    endpoints = [f"--endpoint={one}" for one in endpoints_of(pair)]
    run_ckpt("update", pair[0].checkpoints[which], *endpoints, f"--version={which}", f"--json={report}")
    return json.loads(report.read_text())


def assert_committed(report, version):
    assert report["outcome"] == "committed"
    assert [(rank["engine"], rank["version"]) for rank in report["ranks"]] == [(name, version) for name in ENGINES]


def assert_not_on_a(pair):
    assert all(deployment.answers() != deployment.fresh.tokens["a"] for deployment in pair)


def test_one_command_moves_both(pair, tmp_path):
    """There and back."""
    assert_committed(move(pair, "b", tmp_path), "b")
    assert_not_on_a(pair)
    assert_committed(move(pair, "a", tmp_path), "a")
    assert_back_on_a(pair, "a")


@pytest.fixture
def owners(pair, tmp_path):
    """Starts owners of A, when both engines were moved to B."""
    move(pair, "b", tmp_path)
    assert_not_on_a(pair)
    with ExitStack() as stack:
        yield Owners(stack, tmp_path)


def assert_read_from_owners(report_path, offers):
    """All of it."""
    report = json.loads(report_path.read_text())
    assert_committed(report, "theirs")
    assert report["digest"] == json.loads(offers[0].read_text())["digest"]
    assert sum(agent["network_in_bytes"] for agent in report["agents"]) >= report["size_bytes"]


@pytest.mark.parametrize("library", list(Library), ids=lambda library: library.value)
def test_both_join_from_owners(pair, owners, tmp_path, library):
    offers = owners.start(pair[0].checkpoints.a, library)
    report = tmp_path / "join.json"
    run_ckpt(*join_arguments(offers, endpoints_of(pair), report))
    assert_read_from_owners(report, offers)
    assert_back_on_a(pair, "theirs")


def test_both_join_from_the_owner_that_is_left(pair, owners, tmp_path, kill):
    """The other one does not answer, and is killed when it was asked: to be sure that a part was to come from it."""
    offers = owners.start(pair[0].checkpoints.a, Library.MOONCAKE)
    silent = owners.processes[offers[1]]
    silent.send_signal(signal.SIGSTOP)
    report = tmp_path / "join.json"
    command = [*CKPT, *join_arguments(offers, endpoints_of(pair), report)]
    with subprocess.Popen(command) as join:
        try:
            wait_until_asked(join, offers[1])
            kill(silent.pid)
            assert join.wait(UPDATE_TIMEOUT_S) == 0
        finally:
            join.kill()
    assert_read_from_owners(report, offers)
    assert_back_on_a(pair, "theirs")


def wait_until_asked(join, offer):
    """Until somebody is connected to an owner, though it does not answer."""
    port = int(json.loads(offer.read_text())["contact"].rpartition(":")[2])
    deadline = time.monotonic() + UPDATE_TIMEOUT_S
    while not any(one.raddr and one.raddr.port == port for one in psutil.net_connections("tcp")):
        assert time.monotonic() < deadline, "the owner was never asked"
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {join.wait(POLL_S)} before it asked")


def test_both_follow_or_neither_is_resumed(pair, updater_of, stall, kill):
    """The agent of the second engine is killed when the first engine has loaded: neither serves, whoever resumes it."""
    updater = updater_of(*pair, undo=Undo.NONE, on_progress=stall.on_progress)
    stall.at_middle = lambda: kill(updater.agent_pids[-1])
    with pytest.raises(UpdateAborted) as caught:
        updater.update(pair[0].checkpoints.b, version="B")
    assert stall.reached
    assert isinstance(caught.value.causes[0], PeerLost)
    assert caught.value.by_endpoint == {deployment.url: Outcome.POISONED for deployment in pair}
    for deployment in pair:
        deployment.assert_gives_no_token()
    assert updater.update(pair[0].checkpoints.a, version="mended").outcome is Outcome.COMMITTED
    assert_back_on_a(pair, "mended")


def test_one_that_dies_keeps_the_other_from_serving_the_new_weights(pair, updater_of, stall):
    """The last test: it ends the SGLang server in the middle."""
    survivor, doomed = pair
    updater = updater_of(*pair, undo=Undo.NONE, on_progress=stall.on_progress)
    stall.at_middle = lambda: os.killpg(doomed.server.pid, signal.SIGKILL)
    with pytest.raises(UpdateAborted) as caught:
        updater.update(survivor.checkpoints.b, version="B")
    assert caught.value.by_endpoint == {deployment.url: Outcome.POISONED for deployment in pair}
    survivor.assert_gives_no_token()
    assert updater_of(survivor).update(survivor.checkpoints.a, version="alone").outcome is Outcome.COMMITTED
    assert_back_on_a([survivor], "alone")
