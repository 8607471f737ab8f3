"""CPU time of other processes within windows of time, from samples of /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Window = tuple[float, float]  # of `time.monotonic()`, which is that of the machine
_EVERY_S = 0.05


def cpu_s(pid: int) -> float:
    """CPU time of a process since it started, in user and kernel mode, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CpuSampler:
    """Looks now and then how much CPU time some processes took together."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._times: list[float] = []
        self._taken_s: list[float] = []
        self._ended = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """As long as the block runs."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def within(self, windows: Sequence[Window]) -> float:
        """Seconds of CPU time in these windows, of which the last ended some samples ago."""
        return float(sum(np.diff(np.interp(window, self._times, self._taken_s))[0] for window in windows))

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            taken_s = sum(cpu_s(pid) for pid in self._pids)
            self._taken_s.append(taken_s)
            self._times.append(time.monotonic())
