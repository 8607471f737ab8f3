"""Processes that let others read a checkpoint, as users start them: `ckpt export`; and the command of those who join."""

import subprocess
import sys
from types import SimpleNamespace

from ckpt_conformance.cluster import end
from ckpt_core.config import child_environment

HERE = SimpleNamespace(address="127.0.0.1", prefix=())
CKPT = (sys.executable, "-m", "ckpt_core")


class Owners:
    """`ckpt export` processes, by the file that they wrote; they end with the stack."""

    def __init__(self, stack, directory):
        self._stack, self._directory = stack, directory
        self.processes = {}

    def start(self, checkpoint, library, count=2):
        """So many more; returns their files."""
        return self.start_at([HERE] * count, checkpoint, library)

    def start_at(self, hosts, checkpoint, library):
        """One more on each host (see namespaces.NetHost); returns their files."""
        files = [self._start(host, checkpoint, library) for host in hosts]
        for file in files:
            lines = iter(self.processes[file].stdout.readline, "")
            assert any("is offered over" in line for line in lines), "the owner ended"
        return files

    def _start(self, host, checkpoint, library):
        file = self._directory / f"{library.value}-{len(self.processes)}.json"
        command = [*host.prefix, *CKPT, "export", str(checkpoint), f"--out={file}", f"--host={host.address}"]
        self.processes[file] = self._stack.enter_context(
            subprocess.Popen(
                [*command, f"--library={library.value}", "--version=theirs"],
                env=child_environment(),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self._stack.callback(end, self.processes[file])
        return file


def join_arguments(offers, endpoints, report, *, address=HERE.address):
    """Of `ckpt`: bring engines (NAME=URL) to what these owners have; the report is JSON."""
    options = [f"--host={address}", f"--json={report}", *(f"--endpoint={one}" for one in endpoints)]
    return ["join", *options, *(f"--from={offer}" for offer in offers)]
