"""Directories that nobody else writes, and locks on them that end with their process."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_core.errors import ConfigError

_NAP_S = 0.01


def own_directory(path: Path) -> Path:
    """The directory without symbolic links in its name; made 0700 if absent.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others may write into it.
    """
    real = Path(os.path.realpath(path))
    try:
        real.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = real.stat()
    except OSError as error:
        raise ConfigError(f"{str(real)!r}: cannot be a directory ({error.strerror}); name another one") from error
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"{str(real)!r}: expected a directory of uid {os.geteuid()}, got one of uid {found.st_uid}; name another one"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{str(real)!r}: expected a directory that only its owner writes, got mode {stat.S_IMODE(found.st_mode):o}; "
            f"chmod 700 {real}"
        )
    return real


@contextmanager
def locked(path: Path, *, timeout_s: float, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a directory or file: against other threads as well as other processes.

    Raises:
        ConfigError: somebody held it all the time.
    """
    deadline = time.monotonic() + timeout_s
    with try_locked(path, shared=shared, until=deadline) as held:
        if not held:
            raise ConfigError(
                f"{str(path)!r}: expected its lock within {timeout_s} s, another process or thread has it (`lslocks` "
                "names it); wait for its end"
            )
        yield


@contextmanager
def try_locked(path: Path, *, shared: bool = False, until: float = 0.0) -> Iterator[bool]:
    """The same; says whether it holds the lock. `until` is a `time.monotonic()`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        held = _take(descriptor, shared=shared)
        while not held and time.monotonic() < until:
            time.sleep(_NAP_S)
            held = _take(descriptor, shared=shared)
        yield held
    finally:
        os.close(descriptor)


def _take(descriptor: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
