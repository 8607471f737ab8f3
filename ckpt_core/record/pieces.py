"""What a recorded copy takes of a piece of a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckpt_core.contract import LoadTensor
from ckpt_core.strided import Part, Strided


def taken_of(item: LoadTensor, source: Strided, shape: Sequence[int]) -> Iterator[tuple[Part, Strided]]:
    """Parts of a region of a checkpoint tensor that a piece has, and where they are in the piece, from its first element.

    Args:
        item: the piece: of a box of the tensor, row-major.
        source: the region.
        shape: of the whole tensor.
    """
    if item.box is not None:
        yield from source.parts_in_box(shape, item.box)
    elif 0 not in source.size:
        yield Part(start=(0,) * len(source.size), size=source.size), source
