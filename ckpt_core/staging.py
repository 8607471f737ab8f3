"""The host pool: checkpoint bytes in memory that an agent can copy from, without a second copy.

Files are mapped shared and read-only where they are: on a disk they live in the page cache, in /dev/shm they are memory
already. Tensors of a trainer were written to such a file once (`source.stage_tensors`). Mappings, page locks and digests are
kept as long as the files stay the same, so that an update from the same pool pays for none of them again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from dataclasses import dataclass, field

import numpy as np

from ckpt_core.bucket import Bucket
from ckpt_core.device import Device, HostBytes, Unlock
from ckpt_core.errors import ManifestError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.source import Extent, SourceFile, SourceIndex

_Identity = tuple[int, int, int]  # device, inode, size: a mapping stays good while these do


@dataclass(slots=True, kw_only=True)
class _MappedFile:
    """One file in memory; `digests` by offset hold for one modification time."""

    mapping: mmap.mmap
    array: HostBytes
    unlock: Unlock | None = None
    mtime_ns: int = 0
    digests: dict[tuple[int, int], str] = field(default_factory=dict)

    def close(self) -> None:
        if self.unlock is not None:
            self.unlock()
        self.array = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):  # left to whoever still holds a view
            self.mapping.close()


class HostPool:
    """The mapped files of one checkpoint at a time.

    Args:
        device: what copies out of it; the pool is made fit for it.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._index = SourceIndex(files=(), extents=())
        self._extents: dict[str, Extent] = {}
        self._files: list[_MappedFile] = []
        self._by_identity: dict[_Identity, _MappedFile] = {}

    def adopt(self, index: SourceIndex) -> tuple[int, float]:
        """Hold this checkpoint from now on; bytes and seconds of new page locks.

        Raises:
            ManifestError: a file went away or changed since it was indexed.
        """
        locked, seconds, kept = 0, 0.0, self._by_identity
        self._by_identity = {}
        for file in index.files:
            file.check()
            identity = (file.device, file.inode, file.size_bytes)
            mapped = kept.pop(identity, None) or _map(file)
            self._by_identity[identity] = mapped
            if mapped.unlock is None:
                start = time.perf_counter()
                mapped.unlock = self._device.lock(mapped.array)
                seconds += time.perf_counter() - start
                locked += mapped.array.size
            if mapped.mtime_ns != file.mtime_ns:
                mapped.mtime_ns = file.mtime_ns
                mapped.digests.clear()
        for gone in kept.values():
            gone.close()
        self._index = index
        self._extents = {extent.name: extent for extent in index.extents}
        self._files = [self._by_identity[file.device, file.inode, file.size_bytes] for file in index.files]
        return locked, seconds

    def tensor(self, name: str) -> HostBytes:
        """All bytes of a tensor."""
        extent = self._extents[name]
        return self._files[extent.file].array[extent.offset_bytes : extent.offset_bytes + extent.size_bytes]

    def parts(self, manifest: Manifest, bucket: Bucket) -> list[tuple[int, HostBytes]]:
        """The bytes of a bucket: offset in it, and where they are in the pool.

        Neighbours in the bucket that are neighbours in their file come as one part: on a GPU a copy of 1 MiB reaches
        88 % of the bus, one of 16 MiB 99 %.
        """
        runs: list[list[int]] = []  # offset in bucket, file, offset in file, size
        for piece in bucket.pieces:
            extent = self._extents[manifest.tensors[piece.tensor].name]
            first = extent.offset_bytes + (0 if piece.box is None else _first_byte(piece.box, extent))
            if runs and _continues(runs[-1], piece.offset_bytes, extent.file, first):
                runs[-1][3] += piece.size_bytes
            else:
                runs.append([piece.offset_bytes, extent.file, first, piece.size_bytes])
        return [(offset, self._files[file].array[first : first + size]) for offset, file, first, size in runs]

    def digest(self, name: str) -> str:
        """Content digest of a tensor; computed once per state of its file."""
        extent = self._extents[name]
        file = self._files[extent.file]
        key = (extent.offset_bytes, extent.size_bytes)
        if key not in file.digests:
            file.digests[key] = content_digest(self.tensor(name).data)
        return file.digests[key]

    def check_unchanged(self) -> None:
        """Raise ManifestError where a file was written, cut or replaced since it was indexed."""
        for file in self._index.files:
            file.check()

    def close(self) -> None:
        """Unlock and unmap. Idempotent."""
        for file in self._by_identity.values():
            file.close()
        self._by_identity.clear()
        self._files.clear()
        self._extents.clear()


def _map(file: SourceFile) -> _MappedFile:
    try:
        fd = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise ManifestError(f"cannot open {file.path}: {error.strerror}; put it back and start again") from error
    try:
        mapping = mmap.mmap(fd, file.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    return _MappedFile(mapping=mapping, array=np.frombuffer(mapping, dtype=np.uint8))


def _continues(run: list[int], offset_bytes: int, file: int, first_byte: int) -> bool:
    return run[0] + run[3] == offset_bytes and run[1] == file and run[2] + run[3] == first_byte


def _first_byte(box: Box, extent: Extent) -> int:
    """Offset of a box's first element in its row-major tensor."""
    element, stride = 0, 1
    for start, length in zip(reversed(box.start), reversed(extent.shape), strict=True):
        element += start * stride
        stride *= length
    return element * extent.dtype.itemsize
