"""The directory as real processes: owners with leases, engines that join the fleet's version, also while it is updated."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import httpx
import pytest

from ckpt_core import Joiner, Outcome, Owner, Target
from ckpt_core.config import child_environment
from ckpt_core.directory_client import DirectoryClient
from ckpt_core.endpoint import EndpointOptions
from ckpt_core.errors import EngineError
from ckpt_core.transport.p2p.base import Library

pytestmark = pytest.mark.timeout(240)
TOKEN = "secret"  # noqa: S105
LEASE_S = 2.0
END_S = 30.0


class Commands:
    """`ckpt` processes that end with the test."""

    def __init__(self, stack):
        self._stack = stack
        self.url = ""

    def start(self, *arguments, says=""):
        """Start one and wait until it says something, if it is to say something; the process, and that line."""
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "ckpt_core", *map(str, arguments)],
                env=child_environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self._stack.callback(process.kill)
        found = next((line for line in iter(process.stdout.readline, "") if says in line), None) if says else ""
        assert found is not None, f"{arguments[0]} ended"
        return process, found

    def serve(self, listen="127.0.0.1:0"):
        process, line = self.start("serve", "--listen", listen, says="directory: ")
        self.url = line.split()[-1]
        self.serving = process

    def export(self, *what, name="owner"):
        process, _ = self.start(
            *("export", *what, "--host", "127.0.0.1", "--directory", self.url),
            *("--lease-s", LEASE_S, "--name", name, "--library", "mooncake"),
            says="offered over",
        )
        return process

    def join(self, server, state, report, *options):
        """`ckpt join` of a server on another host: it knows another store."""
        state.mkdir(exist_ok=True)
        command = ["join", "--engine", "reference", "--endpoint", server.url, "--directory", self.url]
        done = subprocess.run(
            [sys.executable, "-m", "ckpt_core", *command, "--json", str(report), *options],
            check=False,
            env={**child_environment(), "CKPT_STATE_DIR": str(state)},
            capture_output=True,
            text=True,
            timeout=120.0,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(report.read_bytes())


@pytest.fixture
def stack():
    with ExitStack() as made:
        yield made


@pytest.fixture
def commands(monkeypatch, stack):
    monkeypatch.setenv("CKPT_DIRECTORY_TOKEN", TOKEN)
    made = Commands(stack)
    made.serve()
    return made


@pytest.fixture
def client(commands):
    with DirectoryClient(commands.url) as made:
        yield made


@pytest.fixture
def empty(start_server, checkpoint_of):
    """Two ranks with dummy weights."""
    return start_server(checkpoint_of(), tp=2, load_format="dummy")


def names(client):
    return [row.entry.name for row in client.owners()]


def test_an_engine_joins_the_version_that_the_fleet_runs(  # noqa: PLR0917
    commands, client, checkpoint_of, start_server, updater_of, empty, tmp_path, eventually
):
    commands.export("--follow")
    first = start_server(checkpoint_of(), tp=2, load_format="dummy")
    updater = updater_of(first, keep_versions=2)
    for which in "ab":
        updater.update(checkpoint_of(which=which), version=f"step {which}")
    eventually(lambda: any(len(row.versions) == 2 for row in client.owners()), "both warm versions are offered")
    report = commands.join(empty, tmp_path / "other", tmp_path / "report.json")
    assert report["version"] == "step b"
    assert empty.live_digests() == first.live_digests()
    assert empty.status()["version"] == "step b"
    assert sum(agent["network_in_bytes"] for agent in report["agents"]) >= report["size_bytes"]
    ready = ["ready", "--engine", "reference", "--endpoint", first.url, "--endpoint", empty.url]
    assert subprocess.run([sys.executable, "-m", "ckpt_core", *ready], check=False, timeout=60.0).returncode == 0
    commands.join(empty, tmp_path / "other", tmp_path / "report.json", "--version", "step a")
    assert empty.status()["version"] == "step a"
    assert client.fleet().version == "step b", "who joins does not say what the fleet runs"


def test_a_dead_owner_is_forgotten_and_one_that_ends_leaves_at_once(commands, client, checkpoint_of, kill, eventually):
    dead, alive = (commands.export(checkpoint_of(), name=name) for name in ("dead", "alive"))
    assert names(client) == ["alive", "dead"]
    epoch = client.fleet().epoch
    kill(dead.pid)
    eventually(lambda: names(client) == ["alive"], "the lease ran out", timeout_s=3 * LEASE_S)
    assert client.fleet().epoch > epoch
    alive.send_signal(signal.SIGTERM)
    assert alive.wait(END_S) == 0
    assert names(client) == []


def test_a_directory_that_was_killed_knows_all_and_what_it_lost_is_told_again(
    commands, client, checkpoint_of, kill, eventually
):
    commands.export(checkpoint_of(), "--version", "one")
    listen = commands.url.rpartition("/")[2]
    kill(commands.serving.pid)
    with pytest.raises(EngineError):
        client.fleet()
    commands.serve(listen)
    assert client.offers("one", 0.0)[0].version == "one"
    (row,) = client.owners()
    client.leave(row.entry.instance)
    eventually(lambda: names(client) == ["owner"], "the owner registered again")
    eventually(lambda: client.owners()[0].versions, "and offered again what it has")


def test_the_next_life_of_an_owner_takes_its_place(commands, client, checkpoint_of):
    first = commands.export("--follow")
    (before,) = client.owners()
    commands.export(checkpoint_of(), "--version", "one")
    (after,) = client.owners()
    assert (before.entry.address, before.entry.instance) != (after.entry.address, after.entry.instance)
    assert before.entry.address == after.entry.address
    assert first.wait(END_S) == 0, "the first saw that it was replaced"
    assert [row.entry.instance for row in client.owners()] == [after.entry.instance]


def test_who_joins_during_an_update_gets_what_it_commits(  # noqa: PLR0917
    commands, client, checkpoint_of, start_server, updater_of, stall, empty, stack
):
    commands.export("--follow")
    first = start_server(checkpoint_of(), tp=2)
    updater = updater_of(first, on_progress=stall.on_progress)
    joiner = stack.enter_context(Joiner([Target(engine="reference", url=empty.url)], client, within_s=60.0))
    joined = []

    def join_meanwhile():
        assert client.fleet().updating
        thread = threading.Thread(target=lambda: joined.append(joiner.join()))
        thread.start()
        joined.append(thread)
        stall.go()

    stall.at_middle = join_meanwhile
    assert updater.update(checkpoint_of(which="b"), version="new").outcome is Outcome.COMMITTED
    joined[0].join(90.0)
    assert joined[1].version == "new"
    assert empty.live_digests() == first.live_digests()


def test_a_trainer_publishes_and_engines_elsewhere_follow(  # noqa: PLR0917
    commands, checkpoint_of, tensors_of, empty, stack, eventually
):
    """The trainer's process offers its tensors; nothing of the project but the directory runs beside it."""

    def serves(version):
        status = empty.status()
        return (status["version"], status["state"]) == (version, "serving")

    owner = stack.enter_context(
        Owner(host="127.0.0.1", library=Library.MOONCAKE, directory=commands.url, lease_s=LEASE_S)
    )
    offers = [owner.publish(tensors_of(checkpoint_of()), version="step 1")]
    follower, _ = commands.start(
        *("join", "--engine", "reference", "--endpoint", empty.url, "--directory", commands.url, "--follow"),
    )
    eventually(lambda: serves("step 1"), "the first version")
    offers.append(owner.publish(tensors_of(checkpoint_of(which="b")), version="step 2"))
    eventually(lambda: serves("step 2"), "the second")
    owner.withdraw(offers[0].digest)
    follower.send_signal(signal.SIGTERM)
    assert follower.wait(END_S) == 0


def test_owners_that_come_back_finish_a_join(commands, checkpoint_of, kill, empty, tmp_path):
    dead = commands.export(checkpoint_of(), "--version", "one")
    kill(dead.pid)  # the directory does not know yet
    reports = []
    thread = threading.Thread(
        target=lambda: reports.append(commands.join(empty, tmp_path / "other", tmp_path / "report.json"))
    )
    thread.start()
    commands.export(checkpoint_of(), "--version", "one")
    thread.join(120.0)
    assert reports[0]["version"] == "one"
    assert empty.status()["version"] == "one"


def test_nothing_is_told_without_the_token(commands):
    without = EndpointOptions(bearer_token=TOKEN[1:])
    with DirectoryClient(commands.url, without) as stranger, pytest.raises(EngineError, match="401"):
        stranger.fleet()
    assert httpx.get(f"{commands.url}/health", trust_env=False).status_code == 200


def test_without_a_token_only_this_host_may_call(monkeypatch):
    monkeypatch.delenv("CKPT_DIRECTORY_TOKEN", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_core", "serve", "--listen", "0.0.0.0:0"],
        check=False,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert done.returncode == 2
    assert "CKPT_DIRECTORY_TOKEN" in done.stderr


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("PUT", "/owners/x", b"{", 400),
        ("PUT", "/owners/x", b'{"instance": "y", "name": "y", "address": "y", "born_at": 1, "lease_s": 5}', 400),
        ("PUT", "/owners/x", b'{"instance": "x", "name": "x", "address": "x", "born_at": 1, "lease_s": 1e9}', 400),
        ("PUT", "/owners/x", b"[" * (2 << 20), 413),
        ("PUT", "/owners/x/offers/d", b"{}", 400),
        ("GET", "/owners/x/offers/d", b"", 404),
        ("GET", "/offering?version=none", b"", 404),
        ("PUT", "/engines", b"{}", 400),
        ("GET", "/", b"", 404),
    ],
)
def test_what_it_refuses(commands, method, path, body, code):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.request(method, commands.url + path, content=body, headers=headers, trust_env=False)
    assert answer.status_code == code
