"""One bucket that is read from other hosts: its leaves in a slot, in chunks, each cover proved when all of it is there."""

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
    """A range of a cover: to be read, or being read.

    Attributes:
        owner, began: who was asked, and when (`time.monotonic()`).
    """

    def __init__(self, bucket: IncomingBucket, cover: int, at_byte: int, size_bytes: int) -> None:
        self.bucket, self.cover = bucket, cover
        self.at_byte, self.size_bytes = at_byte, size_bytes
        self.owner = ""
        self.began = 0.0
        self._pending: Pending | None = None

    def whom(self, owners: Owners) -> str | None:
        """See Owners.next."""
        bucket = self.bucket
        only = next(iter(bucket.asked[self.cover]), "") if bucket.doubted[self.cover] else ""
        return owners.next(bucket.wrong[self.cover], only)

    def ask(self, owner: str, owners: Owners) -> bool:
        """Begin to read; False where that owner turns out to be gone."""
        cover = self.bucket.covers[self.cover]
        local = self.bucket.slot.ctypes.data + cover.at_byte + self.at_byte
        self.owner, self.began = owner, time.monotonic()
        self.bucket.asked[self.cover].add(owner)
        first = cover.first_byte + self.at_byte
        self._pending = owners.read(owner, cover.tensor, first, local, self.size_bytes)
        return self._pending is not None

    def arrived(self) -> bool:
        """See Pending."""
        return self._pending is not None and self._pending.arrived()


class IncomingBucket:
    """A bucket in a slot.

    Attributes:
        covers: what is read for it.
        asked: by cover: owners that were asked for it since it was last compared.
        doubted: by cover: whether it was wrong before; then it is read from one owner at a time, to learn whose bytes are.
        wrong: by cover: owners whose bytes were not what they should be.
    """

    def __init__(self, step: Step, covers: tuple[Cover, ...], slot: HostBytes, leaves: Leaves) -> None:
        self.step, self.covers, self.slot = step, covers, slot
        self.wrong: list[frozenset[str]] = [frozenset()] * len(self.covers)
        self._leaves = leaves
        self._left = [cover.size_bytes for cover in self.covers]
        self.asked: list[set[str]] = [set() for _ in self.covers]
        self.doubted = [False] * len(self.covers)
        self._unproved = len(self.covers)

    @property
    def proved(self) -> bool:
        """Whether all of it is there, and what it should be."""
        return not self._unproved

    def chunks(self) -> Iterator[Chunk]:
        """All that is to be read, in order."""
        for cover in range(len(self.covers)):
            yield from self._chunks(cover)

    def take(self, chunk: Chunk) -> list[Chunk]:
        """A chunk arrived; what is to be read once more, from others, because its cover is not what it should be."""
        number = chunk.cover
        self._left[number] -= chunk.size_bytes
        if self._left[number]:
            return []
        cover = self.covers[number]
        try:
            cover.check(self.slot, self._leaves.extents[cover.tensor], self._leaves.of(cover.tensor))
        except VerificationError as error:
            asked, self.asked[number] = self.asked[number], set()
            _log.warning("read again, from %s it is wrong: %s", ", ".join(sorted(asked)), error)
            if len(asked) == 1:
                self.wrong[number] |= asked
            self.doubted[number] = True
            self._left[number] = cover.size_bytes
            return list(self._chunks(number))
        self._unproved -= 1
        return []

    def parts(self) -> list[tuple[int, HostBytes | DevicePart]]:
        """Its pieces: offset in the bucket, and bytes in the slot."""
        return [(cover.piece_offset_bytes, cover.piece_in(self.slot)) for cover in self.covers]

    def _chunks(self, cover: int) -> Iterator[Chunk]:
        size = self.covers[cover].size_bytes
        for at in range(0, size, CHUNK_BYTES):
            yield Chunk(self, cover, at, min(CHUNK_BYTES, size - at))
