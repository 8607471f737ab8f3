"""Servers of the engine that is installed here, as users start them. No engine here: only cases that bring their own.

One deployment lives at a time; tests are put in the order of their cases, so that each is started once.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # modules beside this file, in an interpreter that imports tests by their paths

from cases import CASES, Case  # noqa: E402
from deployments import INSTALLED, Deployment, Fleet  # noqa: E402

from ckpt_core import Target, UpdateConfig, Updater  # noqa: E402
from ckpt_core.agents import AgentGroup  # noqa: E402
from ckpt_core.config import PauseMode  # noqa: E402
from ckpt_core.metrics import Stage  # noqa: E402
from ckpt_core.wire import Send  # noqa: E402

_ORDER = ("test_updates", "test_streaming", "test_faults")
_WAIT_S = 30.0
_LOG_CHARS = 12000
collect_ignore = (
    ["test_both_engines.py"] if INSTALLED else [path.name for path in HERE.glob("test_*.py") if "both" not in path.name]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.engines)
        item.add_marker(pytest.mark.timeout(900))
    ordered = iter(sorted(mine, key=_place))
    items[:] = [next(ordered) if HERE in item.path.parents else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure comes with what the server wrote."""
    report: pytest.TestReport = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and fleet is not None and (log := fleet.log()):
        report.sections.append(("the server's log ends", log[-_LOG_CHARS:]))
    return report


def _place(item: pytest.Item) -> tuple[int, int]:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    module = _ORDER.index(item.path.stem) if item.path.stem in _ORDER else len(_ORDER)
    return CASES.index(case) if case in CASES else len(CASES), module


@pytest.fixture(scope="session")
def engine() -> str:
    """Name of the engine that is installed here."""
    (name,) = INSTALLED
    return name


@pytest.fixture(scope="session")
def fleet(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(engine, tmp_path_factory.mktemp("checkpoints"))
    yield made
    made.close()


@pytest.fixture
def deployment(fleet: Fleet, case: Case) -> Deployment:
    """Of the test's `case`."""
    return fleet.get(case)


# -- updates -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session", autouse=True)
def roots() -> Iterator[None]:
    """Folders of their own for sockets and shared memory, which other updates of this machine do not touch."""
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-test-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="ckpt-test-") as sockets,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("CKPT_SHM_DIR", memory)
        patch.setenv("CKPT_SOCKET_DIR", sockets)
        yield


@pytest.fixture
def updater_of() -> Iterator[Callable[..., Updater]]:
    """An Updater of deployments, with rings so small that a tiny model takes many buckets."""
    with ExitStack() as stack:

        def updater_of(*deployments: Any, on_progress: Any = None, **options: Any) -> Updater:
            small = {"ring_bytes": 1 << 18, "bucket_bytes": 1 << 16}
            if any(getattr(one, "case", None) and one.case.model == "smollm2" for one in deployments):
                small = {}
            waits = {"attach_timeout_s": 60.0, "transfer_timeout_s": 120.0, "pause_timeout_s": 60.0}
            mode = {"pause_mode": PauseMode.ABORT}
            config = UpdateConfig(**{**small, **waits, **mode, **options})
            targets = [Target(engine=one.engine, url=one.url) for one in deployments]
            return stack.enter_context(Updater(targets, config=config, on_progress=on_progress))

        yield updater_of


class Stall:
    """Holds the last agent of the first update back, so that a transfer stands still in the middle.

    `at_middle` is called once, by the updater's own thread, when a rank has loaded a part and waits for the rest.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = False
        self.at_middle: Callable[[], None] = lambda: None
        self._whole = AgentGroup.start_sending
        self._held = False

        def start_sending(group: Any, **options: Any) -> None:
            self._start(group, **options)

        monkeypatch.setattr(AgentGroup, "start_sending", start_sending)

    def _start(self, group: Any, *, timeout_s: float, **options: Any) -> None:
        if self._held:
            self._whole(group, timeout_s=timeout_s, **options)
            return
        self._held = True
        for peer in group.peers[:-1]:
            group._conversation.tell(peer, Send(timeout_s=timeout_s))
        if len(group.peers) == 1:
            self.reached = True  # of one agent nothing is sent: it stands still before the first byte
            self.at_middle()

    def on_progress(self, stage: Stage, done: int, _total: int) -> None:
        """Give it to the updater."""
        if self._held and stage is Stage.TRANSFER and done > 0 and not self.reached:
            self.reached = True
            self.at_middle()


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> Stall:
    """See Stall."""
    return Stall(monkeypatch)


@pytest.fixture
def kill() -> Callable[[int], None]:
    """kill -9, and wait until the kernel has ended it."""

    def kill(pid: int) -> None:
        descriptor = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            assert select.select([descriptor], [], [], _WAIT_S)[0]
        finally:
            os.close(descriptor)

    return kill
