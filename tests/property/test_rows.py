"""Rows of boxes against the bytes of the boxes themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.layout import Box
from ckpt_core.rows import rows_of, within_regions


@st.composite
def boxes(draw):
    """A shape, a box in it that is not empty, and the size of an element."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    start = [draw(st.integers(0, extent - 1)) for extent in shape]
    size = [draw(st.integers(1, extent - first)) for first, extent in zip(start, shape, strict=True)]
    return shape, Box(start=tuple(start), shape=tuple(size)), draw(st.sampled_from([1, 2, 4]))


def bytes_of(blocks):
    return [
        block.first_byte + row * block.pitch_bytes + byte
        for block in blocks
        for row in range(block.count)
        for byte in range(block.run_bytes)
    ]


def wanted_of(shape, box, itemsize):
    flat = np.arange(int(np.prod(shape)) * itemsize).reshape(*shape, itemsize)
    return flat[box.slices].ravel().tolist()


@given(boxes())
def test_rows_are_the_bytes_of_the_box_in_order(given_box):
    shape, box, itemsize = given_box
    runs = box.byte_runs(shape, itemsize)
    assert bytes_of(rows_of(runs)) == wanted_of(shape, box, itemsize)


@given(boxes(), st.integers(1, 40))
def test_no_block_reaches_over_a_border_and_nothing_is_lost(given_box, region_bytes):
    shape, box, itemsize = given_box
    runs = box.byte_runs(shape, itemsize)
    cut = [part for block in rows_of(runs) for part in within_regions(block, region_bytes)]
    assert bytes_of(cut) == wanted_of(shape, box, itemsize)
    for part in cut:
        last = part.first_byte + (part.count - 1) * part.pitch_bytes + part.run_bytes - 1
        assert part.first_byte // region_bytes == last // region_bytes


def test_columns_of_all_rows_are_one_block():
    box = Box(start=(0, 0, 2), shape=(3, 4, 2))
    (block,) = rows_of(box.byte_runs((3, 4, 8), 2))
    assert (block.first_byte, block.count, block.run_bytes, block.pitch_bytes) == (4, 12, 4, 16)
