"""Shared memory as files in a memory file system: named, 0600, mapped by whoever may open them.

Files instead of POSIX shm names, because a file can be found, measured and removed with a shell, lives in a 0700
directory of its own update, and needs no tracker process.
"""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckpt_core.errors import CapacityError, TransportError


class SharedFile:
    """One mapped file.

    Attributes:
        path: its name.
        size_bytes: its length.
        array: the whole mapping as uint8, shape (size_bytes,).
    """

    def __init__(self, path: Path, size_bytes: int, mapping: mmap.mmap, *, owner: bool) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.array: npt.NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)
        self._mapping: mmap.mmap | None = mapping
        self._owner = owner

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> SharedFile:
        """Make, fill with zeros and map a file that must not exist yet.

        Raises:
            CapacityError: the file system has no room for it.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            try:
                os.posix_fallocate(fd, 0, size_bytes)  # else a full file system is a SIGBUS later
            except OSError as error:
                path.unlink()
                raise CapacityError(
                    f"no room for {size_bytes} bytes of shared memory in {path.parent} ({error.strerror}); give the container a "
                    "larger /dev/shm (--shm-size), set CKPT_SHM_DIR, or ask for a smaller ring"
                ) from error
            try:
                return cls(path, size_bytes, _map(fd, size_bytes), owner=True)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path, size_bytes: int) -> SharedFile:
        """Map a file that another process made.

        Raises:
            TransportError: it is not there, not ours, or shorter than it should be.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise TransportError(
                f"cannot open shared memory {path}: {error.strerror}; in a container, share /dev/shm with the agents "
                "(--ipc=host or a common --ipc)"
            ) from error
        try:
            found = os.fstat(fd)
            if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode) or found.st_size < size_bytes:
                raise TransportError(
                    f"shared memory {path} is not a file of uid {os.getuid()} of at least {size_bytes} bytes (uid {found.st_uid}, "
                    f"{found.st_size} bytes); it is not from this update"
                )
            return cls(path, size_bytes, _map(fd, size_bytes), owner=False)
        finally:
            os.close(fd)

    def close(self) -> bool:
        """Unmap; whoever made the file also removes it. False where somebody still holds a view of it. Idempotent."""
        if self._owner:
            self.path.unlink(missing_ok=True)
        self.array = np.empty(0, dtype=np.uint8)
        if self._mapping is None:
            return True
        try:
            self._mapping.close()
        except BufferError:
            return False  # a view is alive: the mapping goes when it does
        self._mapping = None
        return True


def private_directory(root: Path, prefix: str) -> Path:
    """A new 0700 directory under root."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root))


def remove_directory(path: Path) -> None:
    """Remove a directory made by `private_directory` with all that is in it."""
    shutil.rmtree(path, ignore_errors=True)


def _map(fd: int, size_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # page faults now, not in the middle of an update
    return mmap.mmap(fd, size_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
