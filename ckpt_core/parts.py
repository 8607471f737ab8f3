"""What one rank takes of a bucket, part by part: the same list for who digests the checkpoint and for who compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ckpt_core.bucket import Bucket, Piece
from ckpt_core.layout import Box


class Taken(NamedTuple):
    """A part of a tensor, within one piece of a bucket.

    Attributes:
        piece: its number in the bucket.
        box: in the tensor; None for all of it.
        whole: the part is all of the piece.
    """

    piece: int
    box: Box | None
    whole: bool


def parts_of(bucket: Bucket, boxes: Mapping[int, Sequence[Box | None]]) -> Iterator[Taken]:
    """In order.

    Args:
        boxes: that the rank needs, by index of the tensor, see `Wanted`.
    """
    for number, piece in enumerate(bucket.pieces):
        for box in dict.fromkeys(boxes.get(piece.tensor, ())):
            part = piece.box if box is None else _shared(piece, box)
            if part is not None or box is None:
                yield Taken(number, part, whole=box is None or part == piece.box)


def _shared(piece: Piece, box: Box) -> Box | None:
    return box if piece.box is None else piece.box.intersect(box)
