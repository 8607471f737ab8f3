"""Bytes of a box as rows of equal length at equal distances: what one two-dimensional copy of a device takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_core.layout import ByteRuns


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """`count` rows of `run_bytes`; the first begins at `first_byte`, each next one `pitch_bytes` behind."""

    first_byte: int
    count: int
    run_bytes: int
    pitch_bytes: int


def rows_of(runs: ByteRuns) -> Iterator[Rows]:
    """All runs, in order, in as few blocks as their distances allow."""
    outer = zip(runs.outer_shape, runs.outer_strides_bytes, strict=True)
    walked = [pair for pair in outer if pair[0] > 1] or [(1, max(runs.run_bytes, 1))]
    shape, strides = [extent for extent, _ in walked], [stride for _, stride in walked]
    while len(shape) > 1 and strides[-2] == shape[-1] * strides[-1]:
        shape[-2:], strides[-2:] = [shape[-2] * shape[-1]], [strides[-1]]
    for leading in itertools.product(*map(range, shape[:-1])):
        first = runs.first_offset_bytes + sum(map(int.__mul__, leading, strides))
        yield Rows(first_byte=first, count=shape[-1], run_bytes=runs.run_bytes, pitch_bytes=strides[-1])


def within_regions(rows: Rows, region_bytes: int) -> Iterator[Rows]:
    """The same bytes in the same order, in blocks that do not reach over a multiple of `region_bytes`."""
    while rows.count:
        border = (rows.first_byte // region_bytes + 1) * region_bytes
        whole = max(0, (border - rows.run_bytes - rows.first_byte) // rows.pitch_bytes + 1)
        if whole := min(whole, rows.count):
            yield replace(rows, count=whole)
        elif rows.run_bytes > border - rows.first_byte:
            yield from _cut_row(rows, region_bytes)
            whole = 1
        rows = replace(rows, first_byte=rows.first_byte + whole * rows.pitch_bytes, count=rows.count - whole)


def _cut_row(rows: Rows, region_bytes: int) -> Iterator[Rows]:
    """The first row alone, cut at borders."""
    first, end = rows.first_byte, rows.first_byte + rows.run_bytes
    while first < end:
        stop = min((first // region_bytes + 1) * region_bytes, end)
        yield Rows(first_byte=first, count=1, run_bytes=stop - first, pitch_bytes=rows.pitch_bytes)
        first = stop
