"""Copying tensors into a new segment, proving each by its digest on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import xxhash

from ckpt_core.errors import ConfigError, ManifestError, VerificationError
from ckpt_core.pool_file import POOL_ALIGN_BYTES, reserve
from ckpt_core.source import Extent, SourceFile, SourceIndex
from ckpt_core.tensor_places import Content, Place

_PIECE_BYTES = 1 << 20  # stays in the cache between the read, the digest and the write


def copy_tensors(source: SourceIndex, wanted: Mapping[Content, Extent], path: Path) -> dict[Content, Place]:
    """Copy tensors into a new file (mode 0600), which is on its disk when this returns.

    Args:
        source: where they are.
        wanted: an extent of `source` for each content.
        path: the file; it must not exist.

    Returns:
        Where they are now.

    Raises:
        VerificationError: the bytes have another digest.
        ManifestError: a file of `source` is shorter than it was, or cannot be read.
        CapacityError: the file system is too small.
        ConfigError: the file cannot be made.
    """
    tensors = sorted(wanted.items(), key=lambda item: (item[1].file, item[1].offset_bytes))
    placed = _place([extent for _, extent in tensors])
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{str(path)!r}: cannot be made ({error.strerror}); name a writable directory") from error
    try:
        total_bytes = max(placed[-1].offset_bytes + placed[-1].size_bytes, 1)
        reserve(descriptor, path, total_bytes, "evict versions, free some, or name another directory")
        _copy_all(source, tensors, placed, descriptor)
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync_directory(path.parent)
    file = SourceFile.of(path)
    return {content: (file, extent) for (content, _), extent in zip(tensors, placed, strict=True)}


def _place(extents: Sequence[Extent]) -> list[Extent]:
    placed = []
    end = 0
    for extent in extents:
        offset = -(-end // POOL_ALIGN_BYTES) * POOL_ALIGN_BYTES
        placed.append(replace(extent, file=0, offset_bytes=offset))
        end = offset + extent.size_bytes
    return placed


def _copy_all(
    source: SourceIndex, tensors: Sequence[tuple[Content, Extent]], placed: Sequence[Extent], target: int
) -> None:
    piece = memoryview(bytearray(_PIECE_BYTES))
    with ExitStack() as opened:
        files: dict[int, int] = {}
        for ((expected, _, _), extent), place in zip(tensors, placed, strict=True):
            if extent.file not in files:
                files[extent.file] = opened.enter_context(source.files[extent.file].open()).fileno()
            got = _copy(files[extent.file], extent, target, place.offset_bytes, piece)
            if got != expected:
                raise VerificationError(
                    f"tensor {extent.name!r:.200} of {source.files[extent.file].path!r}: expected bytes of digest {expected}, "
                    f"got {got}; the file was changed or is damaged: make the manifest anew, or the file"
                )


def _copy(source: int, extent: Extent, target: int, offset_bytes: int, piece: memoryview) -> str:
    """Copy one tensor; its `manifest.content_digest`, made of the pieces that were written."""
    state = xxhash.xxh3_128()
    done = 0
    while done < extent.size_bytes:
        part = piece[: min(len(piece), extent.size_bytes - done)]
        count = os.preadv(source, [part], extent.offset_bytes + done)
        if count == 0:
            raise ManifestError(
                f"tensor {extent.name!r:.200}: expected {extent.size_bytes} bytes, got {done}: its file was cut; save it again"
            )
        state.update(part[:count])
        _write(target, part[:count], offset_bytes + done)
        done += count
    return state.hexdigest()


def _write(target: int, data: memoryview, offset_bytes: int) -> None:
    while data:
        count = os.pwrite(target, data, offset_bytes)
        data, offset_bytes = data[count:], offset_bytes + count


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
