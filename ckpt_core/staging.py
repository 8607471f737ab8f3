"""The host pool: checkpoint bytes in memory that an agent can copy from, without a second copy.

Files are mapped shared and read-only where they are: on a disk they live in the page cache, in /dev/shm they are memory
already. Tensors of a trainer were written to such a file once (`source.stage_tensors`).
"""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
import numpy.typing as npt

from ckpt_core.bucket import Bucket
from ckpt_core.errors import ManifestError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.source import Extent, SourceFile, SourceIndex

HostBytes = npt.NDArray[np.uint8]


class HostPool:
    """The mapped files of one checkpoint.

    Raises:
        ManifestError: a file went away or changed since it was indexed.
    """

    def __init__(self, index: SourceIndex) -> None:
        self._index = index
        self._extents = {extent.name: extent for extent in index.extents}
        self._mappings: list[mmap.mmap] = []
        self._arrays: list[HostBytes] = []
        try:
            for file in index.files:
                self._map(file)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._extents)

    def tensor(self, name: str) -> HostBytes:
        """All bytes of a tensor."""
        extent = self._extents[name]
        return self._arrays[extent.file][extent.offset_bytes : extent.offset_bytes + extent.size_bytes]

    def parts(self, manifest: Manifest, bucket: Bucket) -> list[tuple[int, HostBytes]]:
        """The bytes of a bucket: offset in it, and where they are in the pool."""
        result = []
        for piece in bucket.pieces:
            extent = self._extents[manifest.tensors[piece.tensor].name]
            first = extent.offset_bytes + (0 if piece.box is None else _first_byte(piece.box, extent))
            result.append((piece.offset_bytes, self._arrays[extent.file][first : first + piece.size_bytes]))
        return result

    def digest(self, name: str) -> str:
        """Content digest of a tensor."""
        return content_digest(self.tensor(name).data)

    def check_unchanged(self) -> None:
        """Raise ManifestError where a file was written, cut or replaced since it was indexed."""
        for file in self._index.files:
            file.check()

    def close(self) -> None:
        """Unmap, or leave a mapping to whoever still holds a view of it. Idempotent."""
        self._arrays.clear()
        for mapping in self._mappings:
            with contextlib.suppress(BufferError):
                mapping.close()
        self._mappings.clear()

    def _map(self, file: SourceFile) -> None:
        file.check()
        try:
            fd = os.open(file.path, os.O_RDONLY)
        except OSError as error:
            raise ManifestError(f"cannot open {file.path}: {error.strerror}; put it back and start again") from error
        try:
            mapping = mmap.mmap(fd, file.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self._mappings.append(mapping)
        self._arrays.append(np.frombuffer(mapping, dtype=np.uint8))


def _first_byte(box: Box, extent: Extent) -> int:
    """Offset of a box's first element in its row-major tensor."""
    element, stride = 0, 1
    for start, length in zip(reversed(box.start), reversed(extent.shape), strict=True):
        element += start * stride
        stride *= length
    return element * extent.dtype.itemsize
