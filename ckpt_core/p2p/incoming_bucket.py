"""One bucket that is read from other hosts: its leaves in a slot, in chunks of whole leaves, each proved as it arrives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ckpt_core.device import DevicePart, HostBytes
from ckpt_core.errors import VerificationError
from ckpt_core.leaf_digest import Digests, leaf_count
from ckpt_core.p2p.covers import Cover
from ckpt_core.p2p.owners import CHUNK_BYTES, Owners
from ckpt_core.plan import Step
from ckpt_core.source import Extent
from ckpt_core.transport.p2p.base import Pending

_log = logging.getLogger(__name__)


class Leaves:
    """Digests of the leaves of all tensors of a version.

    Args:
        extents: sorted by name.
        packed: 8 bytes a leaf, little-endian, tensor after tensor.
    """

    def __init__(self, extents: Sequence[Extent], packed: bytes) -> None:
        self.extents = extents
        ends = np.cumsum([leaf_count(extent.size_bytes) for extent in extents])
        self._by_tensor = np.split(np.frombuffer(packed, dtype="<u8").astype(np.uint64), ends[:-1])

    def of(self, tensor: int) -> Digests:
        """Of one tensor, by its number."""
        return self._by_tensor[tensor]


class Chunk:
    """A range of a cover, of whole leaves: to be read, or being read.

    Attributes:
        wrong: owners whose bytes were not what they should be.
        owner, began: who was asked, and when (`time.monotonic()`).
    """

    def __init__(
        self, bucket: IncomingBucket, cover: Cover, at_byte: int, size_bytes: int, wrong: frozenset[str] = frozenset()
    ) -> None:
        self.bucket, self.cover = bucket, cover
        self.at_byte, self.size_bytes = at_byte, size_bytes
        self.wrong = wrong
        self.owner = ""
        self.began = 0.0
        self._pending: Pending | None = None

    def ask(self, owner: str, owners: Owners) -> bool:
        """Begin to read; False where that owner turns out to be gone."""
        local = self.bucket.slot.ctypes.data + self.cover.at_byte + self.at_byte
        self.owner, self.began = owner, time.monotonic()
        first = self.cover.first_byte + self.at_byte
        self._pending = owners.read(owner, self.cover.tensor, first, local, self.size_bytes)
        return self._pending is not None

    def arrived(self) -> bool:
        """See Pending."""
        return self._pending is not None and self._pending.arrived()

    def elsewhere(self) -> Chunk:
        """The same, to be read once more, and not from whoever gave these bytes."""
        return Chunk(self.bucket, self.cover, self.at_byte, self.size_bytes, self.wrong | {self.owner})


class IncomingBucket:
    """A bucket in a slot.

    Attributes:
        covers: what is read for it.
    """

    def __init__(self, step: Step, covers: tuple[Cover, ...], slot: HostBytes, leaves: Leaves) -> None:
        self.step, self.covers, self.slot = step, covers, slot
        self._leaves = leaves
        self._unproved_bytes = sum(cover.size_bytes for cover in covers)

    @property
    def proved(self) -> bool:
        """Whether all of it is there, and what it should be."""
        return not self._unproved_bytes

    def chunks(self) -> Iterator[Chunk]:
        """All that is to be read, in order."""
        for cover in self.covers:
            for at in range(0, cover.size_bytes, CHUNK_BYTES):
                yield Chunk(self, cover, at, min(CHUNK_BYTES, cover.size_bytes - at))

    def take(self, chunk: Chunk) -> Chunk | None:
        """A chunk arrived; it is compared while it is in the processor's cache. What is to be read instead where it is wrong."""
        cover = chunk.cover
        extent, expected = self._leaves.extents[cover.tensor], self._leaves.of(cover.tensor)
        try:
            cover.check(self.slot, chunk.at_byte, chunk.size_bytes, extent, expected)
        except VerificationError as error:
            _log.warning("read again, from %s it is wrong: %s", chunk.owner, error)
            return chunk.elsewhere()
        self._unproved_bytes -= chunk.size_bytes
        return None

    def parts(self) -> list[tuple[int, HostBytes | DevicePart]]:
        """Its pieces: offset in the bucket, and bytes in the slot."""
        return [(cover.piece_offset_bytes, cover.piece_in(self.slot)) for cover in self.covers]
