"""What is read for a bucket so that it can be proved: whole leaves of tensors, since it is of those that owners give digests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_core.device import HostBytes
from ckpt_core.errors import PlanError, VerificationError
from ckpt_core.leaf_digest import LEAF_BYTES, Digests, leaf_count, leaves_of
from ckpt_core.plan import Step
from ckpt_core.source import Extent

_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """The leaves of one tensor that a piece of a bucket lies in.

    Attributes:
        tensor: number of its extent.
        first_byte, size_bytes: of the leaves, in the tensor.
        at_byte: where they go in the slot of the bucket.
        skip_bytes: from there to the piece.
        piece_offset_bytes, piece_bytes: the piece, in the bucket.
    """

    tensor: int
    first_byte: int
    size_bytes: int
    at_byte: int
    skip_bytes: int
    piece_offset_bytes: int
    piece_bytes: int

    def piece_in(self, slot: HostBytes) -> HostBytes:
        """The piece, in a slot that holds the leaves."""
        start = self.at_byte + self.skip_bytes
        return slot[start : start + self.piece_bytes]

    def check(self, slot: HostBytes, at_byte: int, size_bytes: int, extent: Extent, expected: Digests) -> None:
        """Compare a range of what arrived, of whole leaves, with the digests of the tensor's leaves.

        Raises:
            VerificationError: a leaf differs.
        """
        first = (self.first_byte + at_byte) // LEAF_BYTES
        start = self.at_byte + at_byte
        found = leaves_of(slot[start : start + size_bytes])
        wrong = np.flatnonzero(found != expected[first : first + len(found)])
        if len(wrong):
            leaf = first + int(wrong[0])
            raise VerificationError(
                f"tensor {extent.name!r:.200}, bytes from {leaf * LEAF_BYTES}: expected digest {expected[leaf]:016x}, got "
                f"{found[wrong[0]]:016x}: damaged on the way, or written by its owner"
            )


def covers_of(step: Step, extents: Sequence[Extent]) -> tuple[Cover, ...]:
    """Of all pieces of a step's bucket, one behind the other.

    Raises:
        PlanError: a piece is no run of bytes of its tensor.
    """
    return tuple(_covers(step, extents))


def slot_bytes(covers: Sequence[Cover]) -> int:
    """Room that they need."""
    return _aligned(covers[-1].at_byte + covers[-1].size_bytes) if covers else 0


def _covers(step: Step, extents: Sequence[Extent]) -> Iterator[Cover]:
    at = 0
    for piece in step.bucket.pieces:
        if not piece.size_bytes:
            continue
        extent = extents[piece.tensor]
        begin = 0
        if piece.box is not None:
            if not piece.box.is_contiguous_in(extent.shape):
                raise PlanError(
                    f"tensor {extent.name!r:.200}: columns cannot be read from other hosts; plan for one host"
                )
            begin = piece.box.byte_runs(extent.shape, extent.dtype.itemsize).first_offset_bytes
        first = begin // LEAF_BYTES * LEAF_BYTES
        end = min(leaf_count(begin + piece.size_bytes) * LEAF_BYTES, extent.size_bytes)
        yield Cover(
            tensor=piece.tensor,
            first_byte=first,
            size_bytes=end - first,
            at_byte=at,
            skip_bytes=begin - first,
            piece_offset_bytes=piece.offset_bytes,
            piece_bytes=piece.size_bytes,
        )
        at = _aligned(at + end - first)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
