"""One checkpoint into a vLLM and an SGLang server in one update: both committed, or neither resumed.

The servers run in the environments of their engines, the update in the plain one.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cases import Case, Fresh, make_checkpoints
from deployments import Deployment, answers_of, start_server

from ckpt_core import Outcome, Undo, UpdateAborted
from ckpt_core.contract import EndpointState
from ckpt_core.errors import PeerLost

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("vllm", "sglang")
CASE = Case(model="llama", tp=1)
UPDATE_TIMEOUT_S = 120


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


def test_one_command_moves_both(pair, tmp_path):
    """There and back, as an operator types it."""
    ckpt = Path(sys.executable).parent / "ckpt"
    endpoints = [f"--endpoint={deployment.engine}={deployment.url}" for deployment in pair]
    for which in "ba":
        report_path = tmp_path / f"{which}.json"
        command = [
            ckpt,
            "update",
            pair[0].checkpoints[which],
            *endpoints,
            f"--version={which}",
            f"--json={report_path}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=UPDATE_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(report_path.read_text())
        assert report["outcome"] == "committed"
        assert [(rank["engine"], rank["version"]) for rank in report["ranks"]] == [(name, which) for name in ENGINES]
        if which == "b":
            assert all(deployment.answers() != deployment.fresh.tokens["a"] for deployment in pair)
    assert_back_on_a(pair, "a")


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
