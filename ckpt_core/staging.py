"""The host pool: checkpoint bytes in memory that an agent can copy from, without a second copy.

Files are mapped shared and read-only where they are: on a disk they live in the page cache, in /dev/shm they are memory
already. Tensors of a trainer were written to such a file once (`source.stage_tensors`). Mappings and page locks are kept as
long as the files stay the same, so that an update from the same pool does not pay for them again.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from ckpt_core.bucket import Bucket
from ckpt_core.device import Device, DevicePart, HostBytes, Unlock
from ckpt_core.errors import ConfigError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.rows import Rows, rows_of, within_regions
from ckpt_core.source import Extent, SourceFile, SourceIndex

_REGION_BYTES = 1 << 30  # page locks are per region: few and large
_LOCK_THREADS = 4
_Identity = tuple[int, int, int]  # device, inode, size: a mapping stays good while these do


@dataclass(slots=True, kw_only=True)
class _MappedFile:
    """One file in memory."""

    mapping: mmap.mmap
    array: HostBytes
    unlocks: list[Unlock] = field(default_factory=list)

    def close(self) -> None:
        for unlock in self.unlocks:
            unlock()
        self.unlocks.clear()
        self.array = np.empty(0, dtype=np.uint8)
        with contextlib.suppress(BufferError):  # left to whoever still holds a view
            self.mapping.close()


class HostPool:
    """The mapped files of one checkpoint at a time.

    Attributes:
        layout: another object whenever a tensor's address may have changed.

    Args:
        device: what copies out of it; the pool is made fit for it.
        turn: where in it this agent begins to lock pages, 0 to 1: two processes that lock the same pages at the same time
            slow each other down.
    """

    def __init__(self, device: Device, *, turn: float = 0.0) -> None:
        self._device = device
        self._turn = turn
        self.layout = object()
        self._index = SourceIndex(files=(), extents=())
        self._extents: dict[str, Extent] = {}
        self._files: list[_MappedFile] = []
        self._opened: dict[str, tuple[int, Unlock]] = {}  # device regions by handle
        self._addresses: list[int] = []
        self._by_identity: dict[_Identity, _MappedFile] = {}

    def adopt(self, index: SourceIndex) -> tuple[int, float]:
        """Hold this checkpoint from now on; bytes and seconds of new page locks.

        Raises:
            ManifestError: a file went away or changed since it was indexed.
        """
        index.check()
        kept, fresh = self._by_identity, list[_MappedFile]()
        self._by_identity = {}
        for file in index.files:
            identity = (file.device, file.inode, file.size_bytes)
            if (mapped := kept.pop(identity, None)) is None:
                mapped = _map(file)
                fresh.append(mapped)
            self._by_identity[identity] = mapped
        for gone in kept.values():
            gone.close()
        opened_or_closed = self._open_regions(index)
        if fresh or kept or opened_or_closed or index.extents != self._index.extents:
            self.layout = object()
        self._index = index
        self._extents = {extent.name: extent for extent in index.extents}
        self._files = [self._by_identity[file.device, file.inode, file.size_bytes] for file in index.files]
        start = time.perf_counter()
        self._lock(fresh)
        return sum(mapped.array.size for mapped in fresh), time.perf_counter() - start

    def parts(self, manifest: Manifest, bucket: Bucket) -> list[tuple[int, HostBytes | DevicePart]]:
        """The bytes of a bucket: offset in it, and where they are in the pool.

        Neighbours in the bucket that are neighbours in their file come as one part: on a GPU a copy of 1 MiB reaches
        88 % of the bus, one of 16 MiB 99 %.
        """
        runs: list[list[int]] = []  # offset in bucket, file, offset in file, size
        strided: list[tuple[int, HostBytes | DevicePart]] = []
        for piece in bucket.pieces:
            extent = self._extents[manifest.tensors[piece.tensor].name]
            if piece.box is not None and not piece.box.is_contiguous_in(extent.shape):
                strided += self._strided(piece.offset_bytes, piece.box, extent)
                continue
            first = extent.offset_bytes + _first_byte(piece.box, extent)
            if runs and _continues(runs[-1], piece.offset_bytes, extent.file, first):
                runs[-1][3] += piece.size_bytes
            else:
                runs.append([piece.offset_bytes, extent.file, first, piece.size_bytes])
        return strided + [
            (offset, self._bytes(file, first, size))
            for run in runs
            for offset, file, first, size in _within_regions(run)
        ]

    def _strided(self, offset: int, box: Box, extent: Extent) -> Iterator[tuple[int, HostBytes | DevicePart]]:
        """A part that is not contiguous, as views of the file: shape (rows, bytes of a row)."""
        if extent.file >= len(self._files):
            raise ConfigError(
                f"tensor {extent.name!r:.200}: parts of tensors on a GPU cannot go to other hosts; give CPU tensors or files"
            )
        file = self._files[extent.file].array
        runs = box.byte_runs(extent.shape, extent.dtype.itemsize)
        runs = replace(runs, first_offset_bytes=extent.offset_bytes + runs.first_offset_bytes)
        for block in rows_of(runs):
            for rows in within_regions(block, _REGION_BYTES):
                yield offset, _rows_in(file, rows)
                offset += rows.count * rows.run_bytes

    def _bytes(self, file: int, first: int, size: int) -> HostBytes | DevicePart:
        if file < len(self._files):
            return self._files[file].array[first : first + size]
        return DevicePart(address=self._addresses[file - len(self._files)] + first, size=size)

    def _open_regions(self, index: SourceIndex) -> bool:
        """Whether any was opened or closed."""
        kept, before, self._opened = self._opened, set(self._opened), {}
        for region in index.regions:
            known = region.handle in kept
            opened = kept.pop(region.handle) if known else self._device.open_region(region.handle)
            self._opened[region.handle] = opened
        changed = bool(kept) or any(handle not in before for handle in self._opened)
        for _, close in kept.values():
            close()
        self._addresses = [self._opened[region.handle][0] for region in index.regions]
        return changed

    def _lock(self, files: list[_MappedFile]) -> None:
        """Lock in regions, by several threads."""
        regions = [
            (file, file.array[first : first + _REGION_BYTES])
            for file in files
            for first in range(0, file.array.size, _REGION_BYTES)
        ]
        begin = int(len(regions) * self._turn)
        with ThreadPoolExecutor(_LOCK_THREADS, thread_name_prefix="ckpt-lock") as threads:
            calls = [
                (file, threads.submit(self._device.lock, region)) for file, region in regions[begin:] + regions[:begin]
            ]
        for file, call in calls:
            file.unlocks.append(call.result())

    def read(self, part: DevicePart) -> HostBytes:
        """A copy of device memory in host memory."""
        return self._device.read(part)

    def digest(self, name: str) -> str:
        """Content digest of a tensor. Never kept: stores through a mapping change no time stamp of a memory file."""
        return content_digest(self.packed(name, None).data)

    def packed(self, name: str, box: Box | None) -> HostBytes:
        """Bytes of a tensor, or of a box of it, row-major: in place where they follow each other there, else a copy."""
        extent = self._extents[name]
        if box is None or box.is_contiguous_in(extent.shape):
            size = extent.size_bytes if box is None else box.size * extent.dtype.itemsize
            return self._read(extent.file, extent.offset_bytes + _first_byte(box, extent), size)
        runs = box.byte_runs(extent.shape, extent.dtype.itemsize)
        first = runs.first_offset_bytes
        last = sum((n - 1) * stride for n, stride in zip(runs.outer_shape, runs.outer_strides_bytes, strict=True))
        within = self._read(extent.file, extent.offset_bytes + first, last + runs.run_bytes if runs.count else 0)
        blocks = [_rows_in(within, replace(rows, first_byte=rows.first_byte - first)) for rows in rows_of(runs)]
        return blocks[0].reshape(-1) if len(blocks) == 1 else np.concatenate([block.reshape(-1) for block in blocks])

    @property
    def files(self) -> tuple[HostBytes, ...]:
        """The bytes of each file."""
        return tuple(file.array for file in self._files)

    def _read(self, file: int, first: int, size: int) -> HostBytes:
        data = self._bytes(file, first, size)
        return self._device.read(data) if isinstance(data, DevicePart) else data

    def check_unchanged(self) -> None:
        """Raise ManifestError where a file was written, cut or replaced since it was indexed."""
        self._index.check()

    def close(self) -> None:
        """Unlock and unmap. Idempotent."""
        for _, close in self._opened.values():
            close()
        self._opened.clear()
        for file in self._by_identity.values():
            file.close()
        self._by_identity.clear()
        self._files.clear()
        self._extents.clear()


def _rows_in(data: HostBytes, rows: Rows) -> HostBytes:
    shape, strides = (rows.count, rows.run_bytes), (rows.pitch_bytes, 1)
    return np.lib.stride_tricks.as_strided(data[rows.first_byte :], shape, strides, writeable=False)


def _map(file: SourceFile) -> _MappedFile:
    with file.open() as opened:
        mapping = mmap.mmap(opened.fileno(), file.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    return _MappedFile(mapping=mapping, array=np.frombuffer(mapping, dtype=np.uint8))


def _continues(run: list[int], offset_bytes: int, file: int, first_byte: int) -> bool:
    return run[0] + run[3] == offset_bytes and run[1] == file and run[2] + run[3] == first_byte


def _within_regions(run: list[int]) -> Iterator[list[int]]:
    """A copy may not reach over the border of two regions: they were locked apart."""
    offset, file, first, size = run
    while size > 0:
        length = min(size, _REGION_BYTES - first % _REGION_BYTES)
        yield [offset, file, first, length]
        offset, first, size = offset + length, first + length, size - length


def _first_byte(box: Box | None, extent: Extent) -> int:
    return 0 if box is None else box.byte_runs(extent.shape, extent.dtype.itemsize).first_offset_bytes
