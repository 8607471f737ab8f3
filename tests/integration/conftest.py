"""Engines, checkpoints and stalled transfers for all tests with real processes; and proof that each leaves nothing behind."""

import os
import select
import signal
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core import Target, Undo, UpdateConfig, Updater
from ckpt_core.agents import AgentGroup
from ckpt_core.metrics import Stage
from ckpt_core.wire import Send

PROMPT = [5, 17, 42, 8]
WAIT_S = 30.0


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def roots():
    """Folders of their own for sockets and shared memory: what is left there was left by these tests."""
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-test-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="ckpt-test-") as sockets,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("CKPT_SHM_DIR", memory)
        patch.setenv("CKPT_SOCKET_DIR", sockets)
        yield Path(memory), Path(sockets)


def agents_alive():
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        mine = (process.info["environ"] or {}).get("CKPT_SHM_DIR") == os.environ["CKPT_SHM_DIR"]
        if mine and "ckpt_core.agent" in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def remains(roots):
    memory, sockets = roots
    mine = (path for path in memory.iterdir() if not path.name.startswith("ckpt-versions-"))
    left = [*mine, *(path for path in sockets.iterdir() if not path.name.startswith("ckpt-locks-"))]
    return [path.name for path in left] + agents_alive()


@pytest.fixture
def eventually():
    """Waits until something holds; fails after a deadline."""

    def eventually(holds, what, timeout_s=WAIT_S):
        deadline, pause = time.monotonic() + timeout_s, threading.Event()
        while not holds():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            pause.wait(0.02)

    return eventually


@pytest.fixture(autouse=True)
def nothing_is_left(roots, eventually):
    """No shared memory, no socket, no agent outlives a test."""
    before = set(remains(roots))
    yield
    with suppress(AssertionError):
        eventually(lambda: before.issuperset(remains(roots)), "clean", timeout_s=5.0)
    assert set(remains(roots)) - before == set()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Checkpoint A or B of a kind of model; B has other values in every tensor."""
    made = {}

    def checkpoint_of(arch="llama", *, tied=False, which="a"):
        key = (arch, tied)
        if key not in made:
            base = tmp_path_factory.mktemp(f"{arch}-{tied}")
            first = make_tiny(base / "a", arch=arch, seed=1, tied=tied, vocab=300)
            made[key] = {"a": first, "b": perturb(first, base / "b", seed=2)}
        return made[key][which]

    return checkpoint_of


@pytest.fixture
def tensors_of():
    """All tensors of a checkpoint directory."""
    return lambda directory: {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def start_server():
    """Starts reference engines that end with the module."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(ReferenceServer(*arguments, **options))


@pytest.fixture
def updater_of():
    """An Updater with small rings and short deadlines, for servers, URLs or workers in this process."""
    with ExitStack() as stack:

        def updater_of(*engines, on_progress=None, **options):
            config = {
                "ring_bytes": 1 << 16,
                "bucket_bytes": 1 << 14,
                "attach_timeout_s": 20.0,
                "transfer_timeout_s": 60.0,
                "commit_timeout_s": 10.0,
                "pause_timeout_s": 20.0,
                "undo": Undo.NONE,  # what a failure leaves is looked at; test_going_back.py asks for more
            } | options
            targets = [_target(engine, number) for number, engine in enumerate(engines)]
            return stack.enter_context(Updater(targets, config=UpdateConfig(**config), on_progress=on_progress))

        yield updater_of


def _target(engine, number):
    if isinstance(engine, str):
        return Target(engine="reference", url=engine)
    if hasattr(engine, "url"):
        return Target(engine="reference", url=engine.url)
    return Target(engine="reference", url=f"worker-{os.getpid()}-{number}", handle=engine)


@pytest.fixture
def answer_of():
    """Greedy tokens of a server or worker."""

    def answer_of(engine):
        if hasattr(engine, "url"):
            return engine.generate(PROMPT, 24, ignore_eos=True)["token_ids"]
        return engine.generate(PROMPT, 24)

    return answer_of


class Stall:
    """Holds the last agent of the first update back, so that a transfer stands still in the middle until `go`.

    `at_middle` is called once, by the updater's own thread, when a rank has loaded a part and waits for the rest.
    """

    def __init__(self):
        self.at_middle = lambda: None
        self.reached = False
        self.go = lambda: None
        self.start_sending = self.hold_last
        self.original = AgentGroup.start_sending

    def hold_last(self, group, timeout_s):
        """Let all agents but the last send."""
        for peer in group.peers[:-1]:
            group._conversation.tell(peer, Send(timeout_s=timeout_s))
        self.go = lambda: group._conversation.tell(group.peers[-1], Send(timeout_s=timeout_s))
        self.start_sending = self.original  # the next update goes through

    def on_progress(self, stage, done, _total):
        if stage is Stage.TRANSFER and done > 0 and not self.reached:
            self.reached = True
            self.at_middle()


@pytest.fixture
def stall(monkeypatch):
    """See Stall. Give its `on_progress` to the updater."""
    made = Stall()
    monkeypatch.setattr(
        AgentGroup, "start_sending", lambda group, *, timeout_s, trace: made.start_sending(group, timeout_s=timeout_s)
    )
    return made


@pytest.fixture
def kill():
    """kill -9, and wait until the kernel has ended it."""

    def kill(pid):
        fd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            assert select.select([fd], [], [], WAIT_S)[0]
        finally:
            os.close(fd)

    return kill


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The machine is shared; workers in this process compute little."""
    torch.set_num_threads(1)
