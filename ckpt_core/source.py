"""Where the bytes of a checkpoint are: safetensors files used in place, or tensors that `pool_file` staged once into a file.

Everything behind this module sees one thing: files, and extents in them. A file in /dev/shm is used where it
is, without a second copy.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError
from ckpt_core.files import read_regular
from ckpt_core.safetensors_header import parse_json_object, read_header

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 200_000_000  # a trillion parameters in 140,000 tensors take some 20 MB

Location = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file as it was when it was opened. `path` is absolute, symbolic links resolved."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Location) -> SourceFile:
        """The file as it is now.

        Raises:
            ManifestError: it does not exist, or is not a regular file.
        """
        real = os.path.realpath(path)
        try:
            status = os.stat(real)
        except OSError as error:
            raise ManifestError(f"{os.fspath(path)!r}: cannot be read ({error.strerror}); check the path") from error
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError(f"{os.fspath(path)!r}: expected a regular file; name a {_SUFFIX} file")
        return cls._as(real, status)

    @classmethod
    def _as(cls, real: str, status: os.stat_result) -> SourceFile:
        return cls(
            path=real,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            device=status.st_dev,
        )

    def check(self) -> None:
        """Raise ManifestError where the file is not the one that was opened, or was written since."""
        self._compare(SourceFile.of(self.path))

    def open(self) -> BinaryIO:
        """The file itself, for reading: whatever is put in its place, before or afterwards, is not read.

        Raises:
            ManifestError: it cannot be opened, is another one by now, or was written since.
        """
        try:
            # no link: `path` has none left, so one that is there now was put there. A FIFO is refused, not waited for.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise ManifestError(
                f"cannot open {self.path}: {error.strerror}; put it back, or mend its permissions, and start again"
            ) from error
        file = os.fdopen(descriptor, "rb")
        try:
            self._compare(SourceFile._as(self.path, os.fstat(descriptor)))
        except ManifestError:
            file.close()
            raise
        return file

    def _compare(self, now: SourceFile) -> None:
        if now != self:
            fields = ("size_bytes", "mtime_ns", "inode", "device")
            changed = [name for name in fields if getattr(now, name) != getattr(self, name)]
            expected = ", ".join(f"{name} {getattr(self, name)}" for name in changed)
            got = ", ".join(f"{name} {getattr(now, name)}" for name in changed)
            raise ManifestError(
                f"{self.path!r} changed since it was opened: expected {expected}, got {got}; "
                "write a new checkpoint beside the old one instead of over it, and start again"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRegion:
    """An allocation in another process's device memory: the accelerator's UUID, the driver's handle in hex, its size."""

    uuid: str
    handle: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The bytes of one tensor, row-major: `size_bytes` at `offset_bytes` of file number `file`.

    Numbers count the index's files first, then its regions.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOwner:
    """A process, normally of another host, whose memory holds all tensors of a version and may be read.

    Attributes:
        name: for messages and reports.
        library: which library of one-sided reads reaches it; see transport.p2p.base.Library.
        contact: how.
        addresses: of each tensor in that process, in order of the index's extents.
        max_bytes_per_s: that this host may read of it; 0 for no limit.
        share: of all bytes, that it should give: see p2p.read_plan; who owns none of it is asked where others fail.
    """

    name: str
    library: str
    contact: str
    addresses: tuple[int, ...]
    max_bytes_per_s: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTime:
    """What reading a version from its owners should take.

    Attributes:
        seconds: of the busiest lane.
        bound_s: what no assignment can beat.
        lanes: that make it so.
    """

    seconds: float
    bound_s: float
    lanes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePools:
    """Where the bytes of a version are when no file of this host has them.

    Attributes:
        owners: all of them hold all of it.
        version: the label under which they have it.
        digests: content digest of each tensor, in order of the index's extents.
        leaves: xxh3-64 of every leaf (see leaf_digest) of every tensor, in that order, 8 bytes each, little-endian.
        host: address of this host, as owners reach it.
        max_bytes_per_s: what this host reads in all; 0 for no limit.
        rdma: names of its RDMA devices to read through; TCP where there are none.
        expected: where the rates of lanes are known.
    """

    owners: tuple[RemoteOwner, ...]
    version: str
    digests: tuple[str, ...]
    leaves: bytes
    host: str = "127.0.0.1"
    max_bytes_per_s: float = 0.0
    rdma: tuple[str, ...] = ()
    expected: ReadTime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceIndex:
    """A checkpoint: files, device memory, or memory of other hosts, and the extent of each tensor in them, sorted by name."""

    files: tuple[SourceFile, ...]
    extents: tuple[Extent, ...]
    regions: tuple[DeviceRegion, ...] = ()
    remote: RemotePools | None = None

    @classmethod
    def of(cls, files: Iterable[SourceFile], extents: Iterable[Extent]) -> SourceIndex:
        """Of files, and extents in any order."""
        return cls(files=tuple(files), extents=tuple(sorted(extents, key=lambda extent: extent.name)))

    @property
    def in_files(self) -> bool:
        """Whether all of it is in files of this host: it can stay warm there."""
        return not self.regions and self.remote is None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(extent.size_bytes for extent in self.extents)

    def check(self) -> None:
        """Raise ManifestError where a file changed since it was opened."""
        for file in self.files:
            file.check()


# -- files ---------------------------------------------------------------------------------------------------
def open_checkpoint(location: Location | Sequence[Location]) -> SourceIndex:
    """Index a checkpoint without reading tensor data.

    Args:
        location: a directory (with a `*.safetensors.index.json`: exactly the files it names; without: all
            `*.safetensors` in it), one safetensors or index file, or a list of safetensors files.

    Raises:
        ManifestError: nothing is there, a file is damaged, a name is in two files, or the index does not fit.
    """
    if not isinstance(location, (str, os.PathLike)):
        return _index_files([Path(path) for path in location])
    path = Path(location)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise ManifestError(
            f"{os.fspath(location)!r} does not exist; name a directory with {_SUFFIX} files, or such files "
            "(a model that is on a hub must be downloaded first)"
        )
    if path.name.endswith(_INDEX_SUFFIX):
        return _open_indexed(path)
    return _index_files([path])


def _open_directory(directory: Path) -> SourceIndex:
    index = _find_index(directory)
    if index is not None:
        return _open_indexed(index)
    files = _visible(directory, _SUFFIX)
    if not files:
        others = [path.name for path in sorted(directory.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
        remedy = f"convert {others[0]} to safetensors" if others else "check the path"
        raise ManifestError(f"{str(directory)!r}: expected *{_SUFFIX} files, got none; {remedy}")
    return _index_files(files)


def _visible(directory: Path, suffix: str) -> list[Path]:
    """Files by suffix, in name order, without hidden ones: macOS puts `._x.safetensors` beside a file."""
    names = (path.name for path in directory.iterdir())
    return [directory / name for name in sorted(names) if name.endswith(suffix) and not name.startswith(".")]


def _find_index(directory: Path) -> Path | None:
    found = _visible(directory, _INDEX_SUFFIX)
    preferred = directory / ("model" + _INDEX_SUFFIX)
    if preferred in found:
        return preferred
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ManifestError(f"{str(directory)!r}: expected one index, got {names}; name the index file to use")
    return found[0] if found else None


def _open_indexed(path: Path) -> SourceIndex:
    weight_map = _read_weight_map(path)
    names = sorted(set(weight_map.values()))
    files = [path.parent / name for name in names]
    for file in files:
        if not file.exists():
            raise ManifestError(
                f"{str(path)!r} names the file {file.name!r}, which does not exist; download or save it again"
            )
    index = _index_files(files)
    _check_weight_map(path, weight_map, names, index)
    return index


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        _check_target(path)
        weight_map = parse_json_object(read_regular(path, _MAX_INDEX_BYTES)).get("weight_map")
    except OSError as error:
        raise ManifestError(f"{str(path)!r}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ManifestError(f"{str(path)!r}: expected a JSON object, got {error}; download or save it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ManifestError(
            f"{str(path)!r}: weight_map: expected an object of tensor name to file name, got "
            f"{weight_map!r:.100}; download or save it again"
        )
    for tensor, name in weight_map.items():
        if not _is_plain_file_name(name):
            raise ManifestError(
                f"{str(path)!r}: tensor {tensor!r:.200}: expected the plain name of a file beside the index, "
                f"got {name!r:.200}; the index must not point elsewhere"
            )
    return weight_map


def _is_plain_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _check_weight_map(path: Path, weight_map: dict[str, str], names: list[str], index: SourceIndex) -> None:
    """Each tensor must be in the file that the index says. Files may hold more: engines load them whole."""
    where = {extent.name: names[extent.file] for extent in index.extents}
    for tensor, name in weight_map.items():
        if where.get(tensor) != name:
            got = f"it in {where[tensor]!r}" if tensor in where else "no such tensor in any file"
            raise ManifestError(
                f"{str(path)!r}: tensor {tensor!r:.200}: expected it in {name!r}, got {got}; "
                "index and files are not of one checkpoint: download or save it again"
            )


def _index_files(paths: Sequence[Path]) -> SourceIndex:
    files: list[SourceFile] = []
    extents: dict[str, Extent] = {}
    for number, path in enumerate(paths):
        _check_target(path)
        file = SourceFile.of(path)
        with file.open() as opened:
            header = read_header(path, opened)
        for tensor in header.tensors:
            if tensor.name in extents:
                first = paths[extents[tensor.name].file]
                raise ManifestError(
                    f"tensor {tensor.name!r:.200} is in two files, {str(first)!r} and {str(path)!r}; "
                    "name only the files of one checkpoint"
                )
            extents[tensor.name] = Extent(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                file=number,
                offset_bytes=tensor.offset_bytes,
                size_bytes=tensor.size_bytes,
            )
        file.check()
        files.append(file)
    if not extents:
        where = ", ".join(repr(str(path)) for path in paths[:4]) or "an empty list of files"
        raise ManifestError(f"expected a checkpoint with tensors, got none in {where}; check the path")
    return SourceIndex.of(files, extents.values())


def _check_target(path: Path) -> None:
    """Links out of a directory are followed: a hub's cache is made of them. What they lead to must not be anybody's to write.

    Raises:
        ManifestError: others may write to it.
    """
    real = Path(os.path.realpath(path))
    if real.parent == Path(os.path.realpath(path.parent)):
        return
    with suppress(OSError):  # who opens it says what is wrong
        status = real.stat()
        ours = status.st_uid in (0, os.getuid())
        # a user's own file may be his group's, too: with umask 002 all are
        others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not ours)
        if others and stat.S_ISREG(status.st_mode):
            raise ManifestError(
                f"{str(path)!r}: a link to {str(real)!r}, which others may write to (mode {stat.S_IMODE(status.st_mode):04o}, "
                f"uid {status.st_uid}); chmod go-w that file, or copy it into the directory"
            )
