"""An owner of a version beside a benchmark: `ckpt export` in a process of its own, and the CPU time that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpu_sampler import cpu_s

from ckpt_core.config import child_environment
from ckpt_core.transport.p2p.base import Library


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """A running owner, and the file with its offer."""

    pid: int
    offer: Path

    def cpu_s(self) -> float:
        """CPU time since it started."""
        return cpu_s(self.pid)

    def move(self, core: int) -> None:
        """Run all its threads there from now on."""
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


@contextmanager
def exporting(checkpoint: Path, out: Path, library: Library, *, prefix: Sequence[str] = ()) -> Iterator[Exporter]:
    """Offer a checkpoint on this host as long as the block runs.

    Args:
        out: where the offer goes.
        prefix: command that runs the owner, such as `taskset -c 0`; it must become the owner.
    """
    command = [*prefix, sys.executable, "-m", "ckpt_core", "export", str(checkpoint), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--library", library.value],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "is offered over" not in (line := process.stdout.readline()):
            assert line, "the owner ended"
        yield Exporter(pid=process.pid, offer=out)
    finally:
        process.terminate()
        process.wait()
