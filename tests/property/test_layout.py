"""Laws of box algebra, against sets of elements drawn as numpy masks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.layout import Box, all_disjoint, covers, joined

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def box_in(draw, shape):
    start = [draw(st.integers(0, extent)) for extent in shape]
    extents = [draw(st.integers(0, extent - first)) for first, extent in zip(start, shape, strict=True)]
    return Box(start=tuple(start), shape=tuple(extents))


@st.composite
def boxes(draw, least=1, most=1):
    """A tensor's shape and boxes in it."""
    shape = draw(shapes)
    return shape, draw(st.lists(box_in(shape), min_size=least, max_size=most))


def mask(shape, *some):
    result = np.zeros(shape, dtype=bool)
    for box in some:
        result[box.slices] = True
    return result


@given(boxes(2, 2))
def test_pairs_agree_with_sets(drawn):
    shape, (a, b) = drawn
    in_a, in_b = mask(shape, a), mask(shape, b)
    common = a.intersect(b)
    assert a.size == in_a.sum()
    assert (common is None) == (not (in_a & in_b).any())
    assert a.disjoint(b) == b.disjoint(a) == (common is None)
    if common is not None:
        assert (mask(shape, common) == (in_a & in_b)).all()
        assert common == b.intersect(a)
        assert (in_a[a.slices][common.relative_to(a).slices]).shape == common.shape
    assert a.contains(b) == bool((in_a | ~in_b).all())


@given(boxes(2, 2))
def test_subtract_leaves_disjoint_boxes_of_the_rest(drawn):
    shape, (a, b) = drawn
    rest = a.subtract(b)
    assert (mask(shape, *rest) == (mask(shape, a) & ~mask(shape, b))).all()
    assert sum(part.size for part in rest) == mask(shape, *rest).sum()
    assert all(part.size for part in rest)
    assert all_disjoint(rest)


@given(boxes(1, 5))
def test_covers_and_all_disjoint_agree_with_sets(drawn):
    shape, (first, *others) = drawn
    assert covers(others, first) == bool((mask(shape, *others) | ~mask(shape, first)).all())
    overlap = sum(mask(shape, box).astype(int) for box in (first, *others)).max(initial=0)
    assert all_disjoint([first, *others]) == (overlap <= 1)


@given(boxes(), st.sampled_from([1, 2, 4]))
def test_byte_runs_are_the_bytes_of_the_box_and_maximal(drawn, itemsize):
    shape, (box,) = drawn
    runs = box.byte_runs(shape, itemsize)
    offsets = list(runs.offsets_bytes())
    assert len(offsets) == runs.count
    found = np.zeros(int(np.prod(shape, dtype=int)) * itemsize, dtype=bool)
    for offset in offsets:
        assert not found[offset : offset + runs.run_bytes].any()
        found[offset : offset + runs.run_bytes] = True
    assert (found == np.repeat(mask(shape, box).reshape(-1), itemsize)).all()
    assert offsets == sorted(offsets)
    assert offsets[:1] == ([runs.first_offset_bytes] if offsets else [])
    edges = np.diff(np.concatenate(([0], found.astype(np.int8), [0])))
    assert runs.count == (edges == 1).sum(), "no two runs touch"
    assert box.is_contiguous_in(shape) == (runs.count <= 1)


@given(boxes(), st.integers(1, 40), st.sampled_from([1, 2, 4]))
def test_split_rows_tiles_the_box_in_order(drawn, max_bytes, itemsize):
    _, (box,) = drawn
    parts = box.split_rows(max_bytes, itemsize)
    assert sum(part.size for part in parts) == box.size
    assert covers(parts, box)
    assert all(part.size * itemsize <= max(max_bytes, itemsize) for part in parts)
    assert all(part.relative_to(box).is_contiguous_in(box.shape) for part in parts)
    assert [part.start for part in parts] == sorted(part.start for part in parts)


@given(boxes(0, 6))
def test_joined_boxes_are_the_same_elements_in_no_more_boxes(drawn):
    shape, parts = drawn
    found = list(joined(parts))
    assert len(found) <= len(parts)
    assert (mask(shape, *found) == mask(shape, *parts)).all()


@given(boxes(), st.integers(1, 40))
def test_rows_that_were_split_are_joined_again(drawn, max_bytes):
    _, (box,) = drawn
    parts = box.split_rows(max_bytes, 1)
    if box.shape and all(part.shape[1:] == box.shape[1:] for part in parts):
        assert list(joined(parts)) == [box]
