"""Files of tensors that other processes map: staged once from memory, each tensor at an aligned offset."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_core.dtypes import DType, size_bytes
from ckpt_core.errors import CapacityError, ConfigError, ManifestError
from ckpt_core.source import Extent, SourceFile, SourceIndex

if TYPE_CHECKING:
    import torch

POOL_ALIGN_BYTES = 256


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
        return SourceIndex.of([SourceFile.of(path)], extents)
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
        reserve(descriptor, path, total, "free some, or name another directory")
        with mmap.mmap(descriptor, total, flags=mmap.MAP_SHARED) as mapping:
            _copy_in(mapping, extents, tensors)
            mapping.flush()
    finally:
        os.close(descriptor)


def reserve(descriptor: int, path: Path, total_bytes: int, remedy: str) -> None:
    """Take the pages of a new pool file now: a full /dev/shm is an error here and SIGBUS in the copy.

    Raises:
        CapacityError: the file system is too small; `remedy` says what to do.
        ConfigError: it cannot hold such a file.
    """
    try:
        os.posix_fallocate(descriptor, 0, total_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ConfigError(f"{str(path.parent)!r}: cannot hold a pool file ({error.strerror})") from error
        status = os.statvfs(path.parent)
        raise CapacityError(
            f"{str(path.parent)!r}: expected {total_bytes} free bytes for the tensors, got "
            f"{status.f_bavail * status.f_frsize}; {remedy}"
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
