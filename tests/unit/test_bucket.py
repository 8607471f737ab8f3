"""Buckets: what goes whole, what is cut, and in which order."""

import random

import pytest

from ckpt_core.bucket import collect_needs, make_buckets, natural_key
from ckpt_core.dtypes import DType
from ckpt_core.errors import CapacityError, CoverageError, ManifestError
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta


def manifest(shapes, dtype=DType.U8):
    return Manifest(tensors=tuple(TensorMeta(name=name, dtype=dtype, shape=shapes[name]) for name in sorted(shapes)))


def rows(first, stop, *rest):
    return Box(start=(first, *[0] * len(rest)), shape=(stop - first, *rest))


def layout(*entries):
    return Layout(entries=tuple(entries))


def contents(given, buckets):
    return [[given.tensors[piece.tensor].name for piece in bucket.pieces] for bucket in buckets]


def test_pieces_are_aligned_and_buckets_filled_in_sequence():
    given = manifest({"a": (100,), "b": (300,), "c": (600,), "d": (1,)})
    buckets = make_buckets(given, [whole_layout(given)], bucket_bytes=1024)
    assert contents(given, buckets) == [["a", "b"], ["c", "d"]]
    assert [piece.offset_bytes for bucket in buckets for piece in bucket.pieces] == [0, 256, 0, 768]
    assert [bucket.size_bytes for bucket in buckets] == [768, 1024]
    assert [bucket.index for bucket in buckets] == [0, 1]
    assert all(piece.box is None for bucket in buckets for piece in bucket.pieces)


def test_a_tensor_that_fits_exactly_stays_with_the_others():
    given = manifest({"a": (256,), "b": (768,), "c": (1024,)})
    assert contents(given, make_buckets(given, [whole_layout(given)], bucket_bytes=1024)) == [["a", "b"], ["c"]]


def test_a_large_tensor_that_may_not_be_cut_gets_a_bucket_of_its_own():
    given = manifest({"a": (10,), "b": (5000,), "c": (10,)})
    buckets = make_buckets(given, [whole_layout(given)], bucket_bytes=1024)
    assert contents(given, buckets) == [["a"], ["b"], ["c"]]
    assert buckets[1].size_bytes == 5120


def test_a_large_tensor_is_cut_along_rows_into_quarter_buckets():
    given = manifest({"a": (40, 100)})
    entries = [LayoutEntry(tensor="a", cut=True, box=rows(0, 20, 100)), LayoutEntry(tensor="a", cut=True)]
    buckets = make_buckets(given, [layout(entry) for entry in entries], bucket_bytes=4096)
    pieces = [piece for bucket in buckets for piece in bucket.pieces]
    assert [piece.box for piece in pieces] == [rows(at, at + 10, 100) for at in range(0, 40, 10)]
    assert len(buckets) == 1


def test_one_who_takes_no_parts_keeps_a_tensor_whole():
    given = manifest({"a": (40, 100)})
    layouts = [layout(LayoutEntry(tensor="a", cut=True)), layout(LayoutEntry(tensor="a", box=rows(0, 4, 100)))]
    (bucket,) = make_buckets(given, layouts, bucket_bytes=1024)
    assert [piece.box for piece in bucket.pieces] == [None]


def test_only_needed_rows_are_sent_and_at_full_width():
    given = manifest({"a": (40, 8), "unused": (9,)})
    columns = Box(start=(30, 4), shape=(5, 4))
    layouts = [
        layout(LayoutEntry(tensor="a", cut=True, box=rows(2, 6, 8))),
        layout(LayoutEntry(tensor="a", cut=True, box=rows(5, 9, 8)), LayoutEntry(tensor="a", cut=True, box=columns)),
    ]
    (bucket,) = make_buckets(given, layouts, bucket_bytes=4096)
    assert [piece.box for piece in bucket.pieces] == [rows(2, 9, 8), rows(30, 35, 8)]


def test_rows_that_touch_travel_together():
    given = manifest({"a": (40, 8)})
    halves = [layout(LayoutEntry(tensor="a", cut=True, box=rows(at, at + 20, 8))) for at in (20, 0)]
    (bucket,) = make_buckets(given, halves, bucket_bytes=4096)
    assert [piece.box for piece in bucket.pieces] == [None]


def test_a_row_larger_than_a_piece_is_cut_inside():
    given = manifest({"experts": (2, 8, 512)})
    buckets = make_buckets(given, [layout(LayoutEntry(tensor="experts", cut=True))], bucket_bytes=4096)
    pieces = [piece for bucket in buckets for piece in bucket.pieces]
    assert [piece.box.start for piece in pieces] == [(e, at, 0) for e in (0, 1) for at in (0, 2, 4, 6)]
    assert {piece.size_bytes for piece in pieces} == {1024}


def test_empty_tensors_and_scalars_arrive_and_empty_slices_do_not():
    given = manifest({"empty": (0, 5), "scalar": (), "sliced": (4,)})
    entries = (
        LayoutEntry(tensor="empty", cut=True),
        LayoutEntry(tensor="scalar", cut=True),
        LayoutEntry(tensor="sliced", cut=True, box=rows(2, 2)),
    )
    (bucket,) = make_buckets(given, [layout(*entries)], bucket_bytes=1024)
    assert [(piece.tensor, piece.box, piece.size_bytes) for piece in bucket.pieces] == [(0, None, 0), (1, None, 1)]


def test_groups_are_in_natural_order_and_never_interleaved():
    names = [f"layers.{i}.{part}.{kind}" for i in range(12) for part in ("mlp", "attn") for kind in ("w", "s")]
    given = manifest(dict.fromkeys([*names, "head.w", "loose"], (10,)))
    shuffled = list(whole_layout(given).entries)
    random.Random(7).shuffle(shuffled)
    buckets = contents(given, make_buckets(given, [layout(*shuffled)], bucket_bytes=512))
    sent = [name for bucket in buckets for name in bucket]
    groups = [name.rpartition(".")[0] or name for name in sent]
    in_order = [f"layers.{i}.{part}" for i in range(12) for part in ("attn", "mlp")]
    assert list(dict.fromkeys(groups)) == ["head", *in_order, "loose"]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index), "each group in one go"
    asked = [entry.tensor for entry in shuffled if entry.group == "layers.3.mlp"]
    assert [name for name in sent if name.startswith("layers.3.mlp")] == asked, "inside a group, as in the layout"


def test_a_group_named_by_one_rank_holds_for_all():
    given = manifest({"a": (1,), "b": (1,), "z": (1,)})
    first = layout(*(LayoutEntry(tensor=name) for name in "abz"))
    second = layout(LayoutEntry(tensor="a", group="g"), LayoutEntry(tensor="z", group="g"))
    third = layout(LayoutEntry(tensor="a", group="zz"), LayoutEntry(tensor="z"))
    (names,) = contents(given, make_buckets(given, [first, second, third], bucket_bytes=4096))
    assert names == ["b", "a", "z"]


def test_natural_key_takes_any_name():
    ordered = ["a.2", "a.2.x", "a.10", "a.10.x", "a.10b", "a.b", "a" + "9" * 5000, "b"]
    shuffled = random.Random(7).sample(ordered, len(ordered))
    assert sorted(shuffled, key=natural_key) == ordered


def test_bytes_by_receiver_counts_shared_bytes_once():
    given = manifest({"a": (10, 4), "b": (5,)}, DType.F32)
    layouts = [
        layout(LayoutEntry(tensor="a", box=rows(0, 4, 4)), LayoutEntry(tensor="a", box=rows(2, 6, 4))),
        layout(LayoutEntry(tensor="a"), LayoutEntry(tensor="a", box=rows(2, 6, 4)), LayoutEntry(tensor="b")),
        layout(),
    ]
    assert collect_needs(given, layouts).bytes_by_receiver() == (6 * 16, 160 + 20, 0)


def test_what_cannot_be_packed():
    given = manifest({"a": (4,)})
    with pytest.raises(CapacityError, match="expected at least one aligned piece of 256 bytes, got 255"):
        make_buckets(given, [whole_layout(given)], bucket_bytes=255)
    with pytest.raises(ManifestError, match="'b': expected in the checkpoint"):
        make_buckets(given, [layout(LayoutEntry(tensor="b"))], bucket_bytes=256)
    with pytest.raises(CoverageError, match="inside"):
        make_buckets(given, [layout(LayoutEntry(tensor="a", box=rows(2, 6)))], bucket_bytes=256)
    assert make_buckets(given, [layout()], bucket_bytes=256) == ()
