"""Strided regions against a brute force over all their elements."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.layout import Box
from ckpt_core.strided import Strided, row_major


@st.composite
def views(draw):
    """A shape, and a view of a row-major tensor of it, as loaders make them: narrowed, permuted, split, expanded."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.arange(int(np.prod(shape))).reshape(shape)
    for d in range(len(shape)):
        first = draw(st.integers(0, shape[d] - 1))
        stop = draw(st.integers(first + 1, shape[d]))
        step = draw(st.integers(1, 2))
        array = array[(slice(None),) * d + (slice(first, stop, step),)]
    if draw(st.booleans()):
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        array = np.broadcast_to(array, (draw(st.integers(1, 3)), *array.shape))
    strides = tuple(stride // array.itemsize for stride in array.strides)
    region = Strided(offset=int(array.flat[0]), size=array.shape, stride=strides)
    return shape, array, region


def elements(region):
    return [
        region.offset + sum(map(int.__mul__, index, region.stride))
        for index in itertools.product(*map(range, region.size))
    ]


@given(views())
def test_the_box_holds_all_elements(given_view):
    shape, array, region = given_view
    assert elements(region) == array.ravel().tolist()
    box = region.box_in(shape)
    assert box.fits(shape)
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    inside = whole[box.slices]
    assert set(array.ravel().tolist()) <= set(inside.ravel().tolist())
    # and no smaller one does
    indexes = np.array(np.unravel_index(array.ravel(), shape))
    assert box.start == tuple(indexes.min(axis=1))
    assert box.stop == tuple(indexes.max(axis=1) + 1)


@given(views(), st.integers(-3, 220), st.integers(0, 220))
def test_parts_within_are_exactly_the_elements_there_once(given_view, first, length):
    _, _, region = given_view
    stop = first + length
    wanted = sorted(
        (index, position)
        for index, position in zip(itertools.product(*map(range, region.size)), elements(region), strict=True)
        if first <= position < stop
    )
    got = []
    for part in region.parts_within(first, stop):
        block = region.block(part)
        for index, position in zip(itertools.product(*map(range, part.size)), elements(block), strict=True):
            got.append((tuple(map(int.__add__, part.start, index)), position))
    assert sorted(got) == wanted


@given(views())
def test_through_a_copy_is_the_same_elements(given_view):
    """A view of a contiguous copy of a view."""
    _, inner_array, inner = given_view
    shape = inner_array.shape
    copy = np.ascontiguousarray(inner_array)
    index = tuple(slice(0, max(1, n - 1)) for n in shape)
    outer_array = copy[index].T
    outer = Strided(
        offset=0, size=outer_array.shape, stride=tuple(s // outer_array.itemsize for s in outer_array.strides)
    )
    found = outer.through(shape, inner)
    assert found is not None
    assert elements(found) == outer_array.ravel().tolist()


@given(st.lists(st.integers(0, 5), max_size=4))
def test_row_major_strides_are_numpys(shape):
    made = np.empty([max(n, 1) for n in shape], dtype=np.int8)
    assert row_major(shape) == made.strides


@st.composite
def views_and_boxes(draw):
    shape, array, region = draw(views())
    start = [draw(st.integers(0, extent - 1)) for extent in shape]
    size = [draw(st.integers(0, extent - first)) for first, extent in zip(start, shape, strict=True)]
    return shape, array, region, Box(start=tuple(start), shape=tuple(size))


@given(views_and_boxes())
def test_parts_in_a_box_are_exactly_the_elements_there_once_and_where_the_packed_box_has_them(given_view):
    shape, array, region, box = given_view
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    packed = np.ascontiguousarray(whole[box.slices]).ravel()
    inside = set(packed.tolist())
    wanted = {index: value for index, value in np.ndenumerate(array) if int(value) in inside}
    found = {}
    for part, local in region.parts_in_box(shape, box):
        for inner, place in zip(itertools.product(*map(range, part.size)), elements(local), strict=True):
            index = tuple(map(int.__add__, part.start, inner))
            assert index not in found
            found[index] = packed[place]
    assert found == wanted
