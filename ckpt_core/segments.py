"""The pool's directory: files that hold tensors, made here or staged here, and given back page by page.

In it are `segment-*` files, which the pool made; `staging-*` directories, whose files are the pool's once it registered them
and which a writer holds locked until then; `store`, a link that names the store they belong to; and, for moments,
`punching-MTIME`, a link to the file that is being punched: a hole changes the time of a file that other versions still know.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt_core.errors import ConfigError, ManifestError
from ckpt_core.owned import locked, own_directory, try_locked
from ckpt_core.punch import Span, gaps_between, pages_of, punch
from ckpt_core.source import SourceFile, SourceIndex

_PUNCH_TIMEOUT_S = 30.0


class Segments:
    """The files of one directory.

    Attributes:
        directory: it.
        can_punch: whether pages were given back so far wherever that was tried.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        """Use a directory, or make it.

        Args:
            directory: a private one; made 0700 if absent.
            identity: of the store that says which files are in use.

        Raises:
            ConfigError: others may write into it, or it belongs to another store.
        """
        self.directory = own_directory(directory)
        self.can_punch = True
        with suppress(FileExistsError):
            (self.directory / "store").symlink_to(identity)
        owner = os.readlink(self.directory / "store")
        if owner != identity:
            raise ConfigError(
                f"pool {str(self.directory)!r}: expected the pool of store {identity}, got that of store {owner}; name another "
                "directory, or remove this one if its store is gone"
            )

    # -- what there is -----------------------------------------------------------------------------------------
    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return [*self.directory.glob("segment-*"), *self.directory.glob("staging-*/*")]

    def holds(self, path: str) -> bool:
        """Whether a file lies in the directory."""
        return path.startswith(f"{self.directory}/")

    def is_staged(self, path: str) -> bool:
        """Whether a file lies in a directory that `staging` made."""
        parent = Path(path).parent
        return parent.parent == self.directory and parent.name.startswith("staging-")

    def size_bytes(self) -> int:
        """Memory that all files hold now."""
        held = 0
        for path in self.files():
            with suppress(FileNotFoundError):  # another process gives files back
                held += path.lstat().st_blocks * 512
        return held

    def check(self, index: SourceIndex) -> None:
        """Raise ManifestError where a file changed or is gone; a hole that is being punched does not count."""
        for file in index.files:
            try:
                file.check()
            except ManifestError:
                if not self.holds(file.path):
                    raise
                self._check_at_rest(file)

    def _check_at_rest(self, file: SourceFile) -> None:
        try:
            with locked(Path(file.path), timeout_s=_PUNCH_TIMEOUT_S, shared=True):
                file.check()
        except OSError:
            file.check()

    def pages_of(self, indexes: Iterable[SourceIndex]) -> dict[str, list[Span]]:
        """What these versions use of the files that are still there."""
        spans: dict[str, list[Span]] = {}
        for index in indexes:
            for file in index.files:
                if self.holds(file.path) and os.path.exists(file.path):
                    spans.setdefault(file.path, [])
            for extent in index.extents:
                path = index.files[extent.file].path
                if extent.size_bytes and path in spans:
                    spans[path].append((extent.offset_bytes, extent.offset_bytes + extent.size_bytes))
        return {path: pages_of(used) for path, used in spans.items()}

    def needed_bytes(self, indexes: Iterable[SourceIndex]) -> int:
        """Memory that remains held for these versions."""
        pages = self.pages_of(indexes)
        if not self.can_punch:
            pages = {path: pages_of([(0, os.stat(path).st_size)]) for path in pages}
        return sum(end - start for used in pages.values() for start, end in used)

    # -- new files ---------------------------------------------------------------------------------------------
    def new_path(self) -> Path:
        """Where the next segment goes."""
        return self.directory / f"segment-{secrets.token_hex(8)}"

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory in this one, whose files nobody removes within the block."""
        name = secrets.token_hex(8)
        fresh, staged = self.directory / f"new-{name}", self.directory / f"staging-{name}"
        fresh.mkdir(mode=0o700)
        with locked(fresh, timeout_s=0):
            fresh.rename(staged)  # only now others look at it, and it is locked
            yield staged

    # -- giving back -------------------------------------------------------------------------------------------
    def reclaim(self, indexes: Iterable[SourceIndex]) -> None:
        """Give back whatever these versions do not use. Only who holds the directory's lock may call it."""
        self._end_punch()
        used = self.pages_of(indexes)
        for path in self.directory.glob("segment-*"):
            self._keep_only(path, used)
        for directory in self.directory.glob("staging-*"):
            with try_locked(directory) as unused:
                for path in directory.iterdir():
                    if not path.is_dir() and (unused or str(path) in used):
                        self._keep_only(path, used)
            if unused:
                with suppress(OSError):  # it still has files in use
                    directory.rmdir()

    def _keep_only(self, path: Path, used: Mapping[str, list[Span]]) -> None:
        if str(path) not in used:
            path.unlink()
            return
        with locked(path, timeout_s=_PUNCH_TIMEOUT_S):
            self._punch(path, used[str(path)])

    def _punch(self, path: Path, pages: list[Span]) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            now = os.fstat(descriptor)
            if not self.can_punch or now.st_blocks * 512 <= sum(end - start for start, end in pages):
                return
            link = self.directory / f"punching-{now.st_mtime_ns}"
            link.symlink_to(path)
            for gap in gaps_between(pages, now.st_size):
                self.can_punch = punch(descriptor, gap) and self.can_punch
                os.utime(descriptor, ns=(now.st_atime_ns, now.st_mtime_ns))
            link.unlink()
        finally:
            os.close(descriptor)

    def _end_punch(self) -> None:
        """Put right the time of a file whose puncher was killed."""
        for link in self.directory.glob("punching-*"):
            mtime_ns = int(link.name.partition("-")[2])
            with suppress(FileNotFoundError):
                os.utime(os.readlink(link), ns=(mtime_ns, mtime_ns))
            link.unlink()
