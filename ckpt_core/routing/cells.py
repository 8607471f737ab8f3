"""Cuts a tensor into disjoint boxes by who needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ckpt_core.layout import Box
from ckpt_core.routing.columns import Ints


def cells(shape: tuple[int, ...], needed: Sequence[Sequence[Box]]) -> list[tuple[Box, int]]:
    """Disjoint boxes whose union is what somebody needs, each with the bit set of those who need all of it.

    A box is as large as it can be made by growing along the last dimension first: a column cut is one strided box.
    Empty slices count only where the tensor itself is empty: it still has to arrive.

    Args:
        shape: of the tensor.
        needed: boxes inside it, by number of who needs them.
    """
    if 0 in shape or not shape:
        everybody = sum(1 << who for who, boxes in enumerate(needed) if boxes)
        return [(Box.whole(shape), everybody)] if everybody else []
    solid = [[box for box in boxes if box.size] for boxes in needed]
    cuts = [_cuts([box for boxes in solid for box in boxes], dim) for dim in range(len(shape))]
    if any(len(cut) < 2 for cut in cuts):
        return []
    labels, masks = _label(solid, cuts)
    return [(_box(cuts, low, high), masks[label]) for low, high, label in _merged(labels) if masks[label]]


def _cuts(boxes: Sequence[Box], dim: int) -> Ints:
    return np.unique([edge for box in boxes for edge in (box.start[dim], box.stop[dim])]).astype(np.int64)


def _label(needed: Sequence[Sequence[Box]], cuts: Sequence[Ints]) -> tuple[Ints, list[int]]:
    """A number for each place of the grid, and the bit set of those who need it, by number."""
    grid = tuple(len(cut) - 1 for cut in cuts)
    inside = np.zeros((len(needed), *grid), dtype=np.bool_)
    for who, boxes in enumerate(needed):
        for box in boxes:
            low = [int(np.searchsorted(cut, edge)) for cut, edge in zip(cuts, box.start, strict=True)]
            high = [int(np.searchsorted(cut, edge)) for cut, edge in zip(cuts, box.stop, strict=True)]
            inside[who][tuple(map(slice, low, high))] = True
    flat = np.packbits(inside.reshape(len(needed), -1), axis=0, bitorder="little")
    kinds, labels = np.unique(flat, axis=1, return_inverse=True)
    masks = [int.from_bytes(kinds[:, kind].tobytes(), "little") for kind in range(kinds.shape[1])]
    return labels.reshape(grid).astype(np.int64), masks


def _merged(labels: Ints) -> Iterator[tuple[list[int], list[int], int]]:
    """Boxes of the grid with one label each: first place, place behind the last, label."""
    free = np.ones(labels.shape, dtype=np.bool_)
    for place in np.ndindex(labels.shape):
        if not free[place]:
            continue
        label = labels[place]
        low, high = list(place), [index + 1 for index in place]
        for dim in reversed(range(labels.ndim)):
            while high[dim] < labels.shape[dim]:
                grown = tuple(
                    slice(high[d], high[d] + 1) if d == dim else slice(low[d], high[d]) for d in range(labels.ndim)
                )
                if not (free[grown] & (labels[grown] == label)).all():
                    break
                high[dim] += 1
        free[tuple(map(slice, low, high))] = False
        yield low, high, int(label)


def _box(cuts: Sequence[Ints], low: Sequence[int], high: Sequence[int]) -> Box:
    start = [int(cut[index]) for cut, index in zip(cuts, low, strict=True)]
    stop = [int(cut[index]) for cut, index in zip(cuts, high, strict=True)]
    return Box(start=tuple(start), shape=tuple(end - begin for begin, end in zip(start, stop, strict=True)))
