"""Boxes by example (their laws are in the property tests), and what check_coverage tells a user."""

import pytest

from ckpt_core.dtypes import DType
from ckpt_core.errors import CoverageError
from ckpt_core.layout import (
    Box,
    Layout,
    LayoutEntry,
    Mismatch,
    all_disjoint,
    box_of,
    check_coverage,
    covers,
    whole_layout,
)
from ckpt_core.manifest import Manifest, TensorMeta

SCALAR = Box(start=(), shape=())


def box(start, shape):
    return Box(start=tuple(start), shape=tuple(shape))


def manifest(**shapes):
    return Manifest(
        tensors=tuple(TensorMeta(name=name, dtype=DType.F32, shape=shapes[name]) for name in sorted(shapes))
    )


def test_a_scalar_is_one_element():
    assert Box.whole(()) == SCALAR
    assert SCALAR.size == 1
    assert SCALAR.intersect(SCALAR) == SCALAR
    assert SCALAR.subtract(SCALAR) == []
    assert SCALAR.contains(SCALAR)
    assert not SCALAR.disjoint(SCALAR)
    assert SCALAR.split_rows(1, 4) == [SCALAR]
    assert SCALAR.relative_to(SCALAR) == SCALAR
    assert list(SCALAR.byte_runs((), 8).offsets_bytes()) == [0]
    assert SCALAR.byte_runs((), 8).run_bytes == 8
    assert covers([SCALAR], SCALAR)
    assert not covers([], SCALAR)


def test_an_empty_box_is_inside_everything_and_meets_nothing():
    empty, some = box((5, 0), (0, 3)), box((0, 0), (2, 3))
    assert some.contains(empty)
    assert empty.intersect(some) is None
    assert some.subtract(empty) == [some]
    assert empty.subtract(some) == []
    assert covers([], empty)
    assert all_disjoint([empty, empty])
    assert empty.byte_runs((9, 3), 4).count == 0
    assert list(empty.byte_runs((9, 3), 4).offsets_bytes()) == []
    assert Box.whole((0, 3)).split_rows(1, 4) == [Box.whole((0, 3))]


def test_subtract_leaves_a_frame():
    frame = Box.whole((4, 4)).subtract(box((1, 1), (2, 2)))
    assert frame == [box((0, 0), (1, 4)), box((3, 0), (1, 4)), box((1, 0), (2, 1)), box((1, 3), (2, 1))]


def test_byte_runs_of_rows_and_columns():
    rows = box((2, 0), (3, 8)).byte_runs((10, 8), 2)
    assert (rows.count, rows.first_offset_bytes, rows.run_bytes) == (1, 32, 48)
    columns = box((1, 2), (3, 4)).byte_runs((10, 8), 2)
    assert (columns.count, columns.run_bytes) == (3, 8)
    assert list(columns.offsets_bytes()) == [20, 36, 52]
    experts = box((1, 2, 0), (2, 2, 5)).byte_runs((4, 6, 5), 1)
    assert (experts.count, experts.run_bytes) == (2, 10)
    assert list(experts.offsets_bytes()) == [40, 70]
    assert box((3, 2, 1), (1, 1, 4)).is_contiguous_in((4, 6, 5))
    assert not box((3, 2, 1), (1, 2, 4)).is_contiguous_in((4, 6, 5))


def test_split_rows_makes_even_parts_and_goes_into_large_rows():
    assert [part.shape for part in Box.whole((10, 4)).split_rows(16 * 4, 4)] == [(4, 4), (4, 4), (2, 4)]
    assert [part.shape for part in Box.whole((9, 4)).split_rows(16 * 4, 4)] == [(3, 4)] * 3
    inner = box((2, 0, 0), (2, 6, 4)).split_rows(12, 1)
    assert inner == [box((row, at, 0), (1, 3, 4)) for row in (2, 3) for at in (0, 3)]
    assert [part.shape for part in Box.whole((1, 5)).split_rows(1, 8)] == [(1, 1)] * 5


def test_slices_take_the_box_out_of_an_array():
    assert box((1, 2), (3, 4)).slices == (slice(1, 4), slice(2, 6))


def test_fits():
    assert box((1, 0), (2, 3)).fits((3, 3))
    assert not box((2, 0), (2, 3)).fits((3, 3))
    assert not box((-1, 0), (2, 3)).fits((3, 3))
    assert not box((1, 0), (-1, 3)).fits((3, 3))
    assert not box((0,), (2,)).fits((3, 3))
    assert not Box(start=(0,), shape=(1, 1)).fits((3, 3))


def test_whole_layout_groups_by_module():
    layout = whole_layout(manifest(**{"lm_head.weight": (2,), "layers.0.q.scale": (), "loose": (0,)}))
    assert [(entry.tensor, entry.group, entry.box, entry.cut) for entry in layout.entries] == [
        ("layers.0.q.scale", "layers.0.q", None, False),
        ("lm_head.weight", "lm_head", None, False),
        ("loose", "", None, False),
    ]


# -- coverage ----------------------------------------------------------------------------------------------------
def test_a_fit_is_silent():
    given = manifest(a=(2,))
    check_coverage({"rank 0": whole_layout(given)}, manifest=given)


def test_missing_and_unknown_names_are_listed_with_ranks_and_options():
    layouts = {
        "rank 0": Layout(entries=(), missing=tuple(f"m{i}" for i in range(11)), unknown=("u",)),
        "rank 1": Layout(entries=(), missing=("m0",)),
    }
    with pytest.raises(CoverageError) as caught:
        check_coverage(layouts)
    missing, unknown = str(caught.value).splitlines()[1:]
    assert "11 tensors missing in the checkpoint (on rank 0, rank 1)" in missing
    assert "'m0', 'm1'" in missing
    assert "'m7' and 3 more; pass --allow-missing" in missing
    assert "'m8'" not in missing
    assert "1 tensor not known to the engine (on rank 0): 'u'; pass --allow-unexpected" in unknown
    with pytest.raises(CoverageError, match="--allow-unexpected"):
        check_coverage(layouts, allow_missing=True)
    with pytest.raises(CoverageError, match="--allow-missing"):
        check_coverage(layouts, allow_unexpected=True)
    check_coverage(layouts, allow_missing=True, allow_unexpected=True)


def test_a_mismatch_is_never_allowed():
    mismatch = Mismatch(tensor="a", expected="BF16 [2, 3]", got="F32 [2, 3]")
    layouts = {f"rank {rank}": Layout(entries=(), mismatched=(mismatch,)) for rank in range(2)}
    with pytest.raises(CoverageError, match=r"on rank 0, rank 1\): 'a' \(expected BF16 \[2, 3\], got F32 \[2, 3\]\)"):
        check_coverage(layouts, allow_missing=True, allow_unexpected=True)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (LayoutEntry(tensor="b"), "'b' .*got nothing"),
        (LayoutEntry(tensor="a", box=box((1, 0), (2, 3))), "inside .2, 3., got start .1, 0. shape .2, 3."),
        (LayoutEntry(tensor="a", box=box((0,), (1,))), "inside"),
        (LayoutEntry(tensor="a", box=box((-1, 0), (1, 3))), "inside"),
    ],
)
def test_slices_outside_the_checkpoint_are_found(entry, what):
    given = manifest(a=(2, 3))
    with pytest.raises(CoverageError, match=what):
        check_coverage({"rank 0": Layout(entries=(entry,))}, manifest=given)


def test_box_of_an_entry():
    inside = box((1, 0), (1, 3))
    assert box_of(LayoutEntry(tensor="a"), (2, 3)) == Box.whole((2, 3))
    assert box_of(LayoutEntry(tensor="a", box=inside), (2, 3)) == inside
    with pytest.raises(CoverageError, match=r"'a': expected a slice inside \[1, 3\]"):
        box_of(LayoutEntry(tensor="a", box=inside), (1, 3))
