"""An update that is cut off in the middle: one agent stands still, and is killed when a rank has loaded what the others sent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ckpt_core.agents import AgentGroup
from ckpt_core.api import Updater
from ckpt_core.metrics import Stage

_PATIENCE_S = 8.0  # until then a rank has told that something was loaded, or it will not


class Interruption:
    """Of one update. `on_progress` is for its Updater, which needs two agents: the ranks must be two."""

    def __init__(self) -> None:
        self._pid = 0
        self._since = 0.0

    @contextmanager
    def of(self, updater: Updater) -> Iterator[None]:
        """The next update of this updater is cut off."""
        original: Callable[..., None] = AgentGroup.start_sending

        def start_sending(agents: AgentGroup, **options: Any) -> None:
            self._pid, self._since = updater.agent_pids[-1], time.monotonic()
            os.kill(self._pid, signal.SIGSTOP)
            original(agents, **options)

        with patch.object(AgentGroup, "start_sending", start_sending):
            yield

    def on_progress(self, stage: Stage, done_bytes: int, _total_bytes: int) -> None:
        """Called by the core while ranks wait."""
        if stage is not Stage.TRANSFER or not self._pid:
            return
        if done_bytes or time.monotonic() - self._since > _PATIENCE_S:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = 0
