"""What holds for every test of the repository."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ckpt_core.config import Environment
from ckpt_core.errors import ConfigError
from ckpt_core.history import pool_directory

# shells start background jobs with Ctrl-C ignored; tests interrupt themselves
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test's controllers remember, the next one's do not know; what they hold in memory ends with the test."""
    state = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("CKPT_STATE_DIR", str(state))
    yield
    with suppress(ConfigError):  # what this test made of the environment
        shutil.rmtree(pool_directory(Environment.read().memory_root, state), ignore_errors=True)
