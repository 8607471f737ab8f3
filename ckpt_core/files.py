"""Directories that nobody else can tamper with, and files that can be read without surprise.

What is kept in a directory that others may write to can be replaced by them; what a name stands for can be a pipe that
never answers, or a device that never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ckpt_core.errors import ConfigError

_ROOT_UID = 0
_OWN = "use a directory of your own instead (mkdir -m 700 DIR makes one)"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW  # O_NONBLOCK: a pipe is refused, not waited for


def check_root(path: Path, called: str) -> Path:
    """The same path, if nobody but its owner, who is this user or root, can replace what is in it.

    A sticky directory like /tmp is fine: there nobody removes what another made. Of the directories above it only those are
    refused that everybody may write to; their owners and groups are trusted.

    Args:
        path: the directory.
        called: what the message begins with: NAME=PATH of the variable that chose it.

    Raises:
        ConfigError: others could, or there is no such directory.
    """
    real = Path(os.path.realpath(path))
    status = _status_of(real, called)
    if status.st_uid not in (_ROOT_UID, os.getuid()):
        raise ConfigError(
            f"{called}: expected a directory of uid {os.getuid()} or of root, got one of uid {status.st_uid} "
            f"(mode {_mode(status)}); {_OWN}"
        )
    if _is_open_to(status, stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{called}: expected a directory that only its owner may write to, got mode {_mode(status)} of uid "
            f"{status.st_uid}; chmod go-w {real}, or {_OWN}"
        )
    for above in real.parents:
        status = _status_of(above, called)
        if _is_open_to(status, stat.S_IWOTH):
            raise ConfigError(
                f"{called}: everybody may replace it, because {above} above it has mode {_mode(status)} (uid "
                f"{status.st_uid}); chmod o-w or +t {above}, or {_OWN}"
            )
    return path


def own_directory(path: Path) -> Path:
    """The same path: a 0700 directory of this user, made now if it is not there.

    Raises:
        ConfigError: somebody else made it first, it is a link or no directory, others may enter it, or it cannot be made.
    """
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make the directory {path}: {error.strerror}; choose another place for it") from error
    private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and private:
        return path
    kind = "a directory" if stat.S_ISDIR(status.st_mode) else "something else"
    raise ConfigError(
        f"{path}: expected a directory of uid {os.getuid()} with mode 0700, got {kind} of uid {status.st_uid} with mode "
        f"{_mode(status)}; it may be another user's trap: have it removed, or set CKPT_SOCKET_DIR to a directory of your own"
    )


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, links resolved, for reading.

    Raises:
        OSError: it is none, or cannot be read.
        ValueError: a NUL in the path.
    """
    real = os.path.realpath(path)
    _refuse_special(os.stat(real), path)  # before it is opened: with some devices that alone does something
    file = os.fdopen(os.open(real, _READ), "rb")
    try:
        _refuse_special(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        OSError: it is none, is larger than that, or cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes} bytes", os.fspath(path))
    return data


def _status_of(path: Path, called: str) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{called}: {error.strerror}; create it or choose another") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{called} is not a directory; create it or choose another")
    return status


def _is_open_to(status: os.stat_result, who: int) -> bool:
    return bool(status.st_mode & who) and not status.st_mode & stat.S_ISVTX


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"


def _refuse_special(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
