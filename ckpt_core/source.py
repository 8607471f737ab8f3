"""Where the bytes of a checkpoint are: safetensors files used in place, or tensors staged once into a file.

Everything behind this module sees one thing: files, and extents in them. A file in /dev/shm is used where it
is, without a second copy.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ckpt_core.dtypes import DType, size_bytes
from ckpt_core.errors import CapacityError, ConfigError, ManifestError
from ckpt_core.files import read_regular
from ckpt_core.safetensors_header import parse_json_object, read_header

if TYPE_CHECKING:
    import torch

POOL_ALIGN_BYTES = 256
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
class SourceIndex:
    """A checkpoint: files, device memory, and the extent of each tensor in them, sorted by name."""

    files: tuple[SourceFile, ...]
    extents: tuple[Extent, ...]
    regions: tuple[DeviceRegion, ...] = ()

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
    return _sorted_index(files, extents.values())


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


def _sorted_index(files: Iterable[SourceFile], extents: Iterable[Extent]) -> SourceIndex:
    return SourceIndex(files=tuple(files), extents=tuple(sorted(extents, key=lambda extent: extent.name)))


# -- tensors in memory ---------------------------------------------------------------------------------------
def stage_tensors(tensors: Mapping[str, torch.Tensor], directory: Path) -> SourceIndex:
    """Copy named tensors once into a new pool file (mode 0600) that other processes can map.

    Any strides and devices; each tensor gets its own extent, aligned to 256 bytes, shared storage or
    not. The caller owns the file (`index.files[0].path`) and removes it.

    Args:
        tensors: dense tensors by checkpoint name.
        directory: where the file goes; normally on /dev/shm.

    Raises:
        ManifestError: no tensors, or one that a checkpoint cannot hold (dtype, sparse, meta, distributed).
        CapacityError: the file system is too small.
        ConfigError: the directory cannot be written.
    """
    if not tensors:
        raise ManifestError("expected named tensors, got none; give at least one")
    extents = _lay_out(tensors)
    total = max(extents[-1].offset_bytes + extents[-1].size_bytes, 1)
    path = Path(directory) / f"ckpt-pool-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        _write_pool(path, total, extents, tensors)
        return _sorted_index([SourceFile.of(path)], extents)
    except BaseException:
        with suppress(FileNotFoundError):
            path.unlink()
        raise


def restage_tensors(tensors: Mapping[str, torch.Tensor], staged: SourceIndex) -> SourceIndex | None:
    """Write tensors over those that `stage_tensors` staged before, or None where names, dtypes or shapes differ.

    Pages stay where they are, and so do the page locks of agents. Nobody may be reading.
    """
    extents = _lay_out(tensors)
    if tuple(sorted(extents, key=lambda extent: extent.name)) != staged.extents:
        return None
    path = Path(staged.files[0].path)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with mmap.mmap(descriptor, staged.files[0].size_bytes, flags=mmap.MAP_SHARED) as mapping:
            _copy_in(mapping, extents, tensors)
            mapping.flush()
        os.utime(descriptor)  # memory file systems do not note writes through a mapping
    finally:
        os.close(descriptor)
    return SourceIndex(files=(SourceFile.of(path),), extents=staged.extents)


def _lay_out(tensors: Mapping[str, torch.Tensor]) -> list[Extent]:
    extents = []
    end = 0
    for name, tensor in tensors.items():
        dtype = _stageable_dtype(name, tensor)
        shape = tuple(tensor.shape)
        offset = -(-end // POOL_ALIGN_BYTES) * POOL_ALIGN_BYTES
        end = offset + size_bytes(shape, dtype)
        extents.append(
            Extent(name=name, dtype=dtype, shape=shape, file=0, offset_bytes=offset, size_bytes=end - offset)
        )
    return extents


def _stageable_dtype(name: str, tensor: Any) -> DType:
    import torch

    if not isinstance(tensor, torch.Tensor):
        got, remedy = type(tensor).__name__, "give torch tensors"
    elif tensor.is_meta:
        got, remedy = "a meta tensor", "load its data first"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        got, remedy = f"layout {tensor.layout}", "call .to_dense() on it"
    elif hasattr(tensor, "full_tensor"):
        got, remedy = "a distributed tensor", "call .full_tensor() on it"
    else:
        try:
            return DType.from_torch_name(str(tensor.dtype))
        except KeyError:
            got, remedy = str(tensor.dtype), "convert it to a type that safetensors has"
    raise ManifestError(f"tensor {name!r:.200}: expected a dense tensor with data, got {got}; {remedy}")


def _write_pool(path: Path, total: int, extents: list[Extent], tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{str(path.parent)!r}: cannot hold a pool file ({error.strerror}); name a writable directory"
        ) from error
    try:
        _reserve(descriptor, path, total)
        with mmap.mmap(descriptor, total, flags=mmap.MAP_SHARED) as mapping:
            _copy_in(mapping, extents, tensors)
            mapping.flush()
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, path: Path, total: int) -> None:
    """Take the pages now: a full /dev/shm is an error here and SIGBUS in the copy."""
    try:
        os.posix_fallocate(descriptor, 0, total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ConfigError(f"{str(path.parent)!r}: cannot hold a pool file ({error.strerror})") from error
        status = os.statvfs(path.parent)
        raise CapacityError(
            f"{str(path.parent)!r}: expected {total} free bytes for the tensors, got "
            f"{status.f_bavail * status.f_frsize}; free some, or name another directory"
        ) from error


def _copy_in(mapping: mmap.mmap, extents: list[Extent], tensors: Mapping[str, torch.Tensor]) -> None:
    import torch

    # torch keeps no lock on the mapping: no view of it may leave here, since the caller unmaps.
    pool = torch.frombuffer(mapping, dtype=torch.uint8)
    for extent in extents:
        if extent.size_bytes:
            source = tensors[extent.name].detach()
            part = pool[extent.offset_bytes : extent.offset_bytes + extent.size_bytes]
            part.view(source.dtype).view(source.shape).copy_(source)
