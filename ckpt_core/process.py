"""Facts about this process, and watching others die."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import msgspec

from ckpt_core.errors import TransportError
from ckpt_core.wire import ProcessInfo


def current() -> ProcessInfo:
    """Where this process runs."""
    return ProcessInfo(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid=os.getpid(),
        uid=os.getuid(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        ipc_namespace=os.readlink("/proc/self/ns/ipc"),
        net_namespace=os.readlink("/proc/self/ns/net"),
        host=socket.gethostname(),
    )


def check_can_share(mine: ProcessInfo, other: ProcessInfo, who: str) -> None:
    """Raise where `other` cannot map this process's shared memory, with what to do about it.

    Raises:
        TransportError: another host, another user, or a container with namespaces of its own.
    """
    if other.boot_id != mine.boot_id:
        raise TransportError(
            f"{who} runs on host {other.host}, the agents on {mine.host}; start agents on its own host"
        )
    if other.uid != mine.uid:
        raise TransportError(
            f"{who} runs as uid {other.uid}, the agents as uid {mine.uid}; run both as the same user, shared memory is "
            "readable by its owner only"
        )
    if other.ipc_namespace != mine.ipc_namespace:
        raise TransportError(
            f"{who} is in another IPC namespace ({other.ipc_namespace}, here {mine.ipc_namespace}); start its container with "
            "--ipc=host, or both with the same --ipc=container:ID"
        )


class ProcessMark(msgspec.Struct, frozen=True, kw_only=True):
    """Which process, for good: a number comes again, a number with its start and boot does not.

    Attributes:
        pid, start_ticks: its number, and when it started in clock ticks since the boot.
        boot_id, pid_namespace: where that number counts.
    """

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: str

    @classmethod
    def here(cls) -> ProcessMark:
        """The mark of this process."""
        mine = current()
        ticks = _start_ticks(mine.pid)
        assert ticks is not None, "this process runs"
        return cls(pid=mine.pid, start_ticks=ticks, boot_id=mine.boot_id, pid_namespace=mine.pid_namespace)

    def is_gone(self) -> bool:
        """Whether it surely ended; False also where it cannot be seen from this PID namespace."""
        mine = current()
        if self.boot_id != mine.boot_id:
            return True
        return self.pid_namespace == mine.pid_namespace and _start_ticks(self.pid) != self.start_ticks


def _start_ticks(pid: int) -> int | None:
    """When a process started; None where there is none, or nothing but its exit status is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # its name may hold spaces and brackets
    return None if state in "ZX" else int(fields[18])


class DeathWatch:
    """Notices at once when processes of this PID namespace end, by pidfds; others are left to deadlines."""

    def __init__(self, mine: ProcessInfo) -> None:
        self._mine = mine
        self._poll = select.poll()
        self._names: dict[int, str] = {}  # by pidfd
        self._gone: set[str] = set()  # gone before the watch began

    def add(self, process: ProcessInfo, name: str) -> None:
        """Watch a process. One that is gone already is reported by the next `dead`."""
        if process.boot_id != self._mine.boot_id or process.pid_namespace != self._mine.pid_namespace:
            return
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._gone.add(name)
        except OSError:
            return  # no pidfds on this kernel: deadlines remain
        else:
            self._names[fd] = name
            self._poll.register(fd, select.POLLIN)

    def dead(self) -> list[str]:
        """Names of those that ended."""
        return sorted(self._gone | {self._names[fd] for fd, _ in self._poll.poll(0)})

    def drop(self, name: str) -> None:
        """Stop watching a process."""
        self._gone.discard(name)
        for fd in [fd for fd, known in self._names.items() if known == name]:
            del self._names[fd]
            self._poll.unregister(fd)
            os.close(fd)

    def close(self) -> None:
        """Forget everybody."""
        for name in set(self._names.values()):
            self.drop(name)
