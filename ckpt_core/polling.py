"""Waiting for a number that another process changes: spin a little, then sleep in short naps, always with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_SPIN_S = 500e-6  # each look gives the core away first: agents and ranks may share one
_NAP_S = 30e-6
_LONGEST_NAP_S = 500e-6
_CHECK_EVERY_S = 5e-3


class Poller:
    """Waits for conditions on behalf of one loop.

    Args:
        check: called a few hundred times a second while waiting; raises to end the wait (abort, lost controller).
        deadline: `time.monotonic()` after which `expired` is raised.
        expired: makes the error of the deadline from what was waited for.

    Attributes:
        waited_s: total time spent in `until`.
    """

    def __init__(self, *, check: Callable[[], None], deadline: float, expired: Callable[[str], Exception]) -> None:
        self._check = check
        self._deadline = deadline
        self._expired = expired
        self._checked = 0.0
        self.waited_s = 0.0

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Return when `ready()`; raise what `check` raises, or the error of the deadline."""
        if ready():
            return
        start = time.monotonic()
        try:
            self._spin(ready, what)
        finally:
            self.waited_s += time.monotonic() - start

    def _spin(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _SPIN_S
        while time.monotonic() < end:
            os.sched_yield()
            if ready():
                return
        nap_s = _NAP_S
        while not ready():
            self.check_now_and_then(what)
            time.sleep(nap_s)
            nap_s = min(nap_s * 1.5, _LONGEST_NAP_S)

    def check_now_and_then(self, what: str) -> None:
        """Run the check if the last one is some milliseconds ago. For loops that are busy rather than waiting."""
        now = time.monotonic()
        if now - self._checked < _CHECK_EVERY_S:
            return
        self._checked = now
        self._check()
        if now > self._deadline:
            raise self._expired(what)
