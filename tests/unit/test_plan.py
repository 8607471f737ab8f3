"""Plans by example: owners, rings, receivers; and that unsafe plans are refused."""

from dataclasses import replace

import msgspec
import pytest
from msgspec.structs import replace as altered

from ckpt_core.assign import assign_owners
from ckpt_core.bucket import Bucket
from ckpt_core.dtypes import DType
from ckpt_core.errors import CapacityError, CkptError, PlanError
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import LastWriters, Plan, check_plan, make_plan
from ckpt_core.wanted import Wanted


def manifest(*sizes, dtype=DType.U8):
    return Manifest(
        tensors=tuple(TensorMeta(name=f"t{i:02}", dtype=dtype, shape=(size,)) for i, size in enumerate(sizes))
    )


def plan_of(given, layouts=None, **sizes):
    asked = {"agents": 1, "ring_bytes": 4096, "bucket_bytes": 1024, **sizes}
    return make_plan(given, [whole_layout(given)] if layouts is None else layouts, **asked)


def tensors(*names, **fields):
    return Layout(entries=tuple(LayoutEntry(tensor=name, **fields) for name in names))


# -- owners ------------------------------------------------------------------------------------------------------
def test_equal_buckets_go_round():
    assert assign_owners([5] * 7, 3) == (0, 1, 2, 0, 1, 2, 0)


def test_a_large_bucket_gives_its_owner_a_rest():
    assert assign_owners([30, 10, 10, 10, 10], 2) == (0, 1, 1, 1, 0)


# -- rings -------------------------------------------------------------------------------------------------------
def places(plan, owner=0):
    steps = [step for step in plan.steps if step.owner == owner]
    return [(step.seq, step.ring_offset_bytes, step.free_after_seq) for step in steps]


def test_buckets_go_round_the_ring_and_wait_for_what_they_overwrite():
    plan = plan_of(manifest(*[1024] * 6), ring_bytes=2048)
    assert places(plan) == [(1, 0, 0), (2, 1024, 0), (3, 0, 1), (4, 1024, 2), (5, 0, 3), (6, 1024, 4)]


def test_what_does_not_fit_before_the_end_begins_at_the_start():
    plan = plan_of(manifest(1024, 768, 1024, 512), ring_bytes=2560)
    assert places(plan) == [(1, 0, 0), (2, 1024, 0), (3, 0, 1), (4, 1024, 2)]


def test_each_owner_has_a_ring_and_numbers_of_its_own():
    plan = plan_of(manifest(*[1024] * 5), agents=2, ring_bytes=1024)
    assert [(step.owner, step.seq) for step in plan.steps] == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]
    assert places(plan, 1) == [(1, 0, 0), (2, 0, 1)]
    assert plan.bytes_by_owner == (3072, 2048)
    assert plan.size_bytes == 5120


def test_the_ring_grows_to_the_largest_bucket_and_says_so():
    grown = plan_of(manifest(10, 9000), ring_bytes=2000)
    assert (grown.asked_ring_bytes, grown.ring_bytes, grown.ring_grew) == (2000, 9216, True)
    plain = plan_of(manifest(10), ring_bytes=2000)
    assert (plain.ring_bytes, plain.ring_grew) == (1792, False)


def test_last_writers_remember_what_lies_behind_a_gap():
    ring = LastWriters()
    assert ring.overwrite(0, 60, 1) == 0
    assert ring.overwrite(60, 90, 2) == 0
    assert ring.overwrite(0, 50, 3) == 1
    assert ring.overwrite(50, 58, 4) == 1
    assert ring.overwrite(52, 95, 5) == 4
    assert ring.overwrite(7, 7, 6) == 0
    assert ring.overwrite(10, 20, 7) == 3
    assert ring.overwrite(0, 5, 8) == 3
    assert ring.overwrite(0, 100, 9) == 8


# -- receivers ---------------------------------------------------------------------------------------------------
def test_receivers_are_those_who_need_an_element():
    given = manifest(1024, 1024, 1024)
    half = Box(start=(0,), shape=(512,))
    layouts = [tensors("t00", "t01"), tensors("t01", box=half), tensors(), tensors("t01", "t02")]
    plan = plan_of(given, layouts)
    assert [step.receivers for step in plan.steps] == [(0,), (0, 1, 3), (3,)]
    assert plan.bytes_needed_by_receiver == (2048, 512, 0, 2048)
    assert plan.receivers == 4


def test_an_empty_tensor_has_receivers_too():
    given = manifest(0)
    (step,) = plan_of(given, [tensors("t00"), tensors()]).steps
    assert step.receivers == (0,)
    assert step.bucket.size_bytes == 0


def test_nothing_needed_is_an_empty_plan():
    plan = plan_of(manifest(5), [tensors()])
    assert plan.steps == ()
    check_plan(plan, manifest(5), {0: Wanted(manifest(5), tensors())})


@pytest.mark.parametrize(
    "sizes", [{"agents": 0}, {"ring_bytes": 0}, {"ring_bytes": 255}, {"bucket_bytes": 255}, {"bucket_bytes": -1}]
)
def test_impossible_sizes(sizes):
    with pytest.raises(CapacityError, match="expected at least"):
        plan_of(manifest(5), **sizes)


def test_no_receivers():
    with pytest.raises(CapacityError, match="receivers: expected at least 1, got 0"):
        plan_of(manifest(5), [])


# -- digest and travel -------------------------------------------------------------------------------------------
def test_a_plan_travels_and_its_digest_is_its_content():
    given = manifest(1024, 3000, 0, 7)
    layouts = [tensors("t00", "t01", cut=True), whole_layout(given)]
    plan = plan_of(given, layouts, agents=2)
    digest = plan.digest
    for encoding in (msgspec.msgpack, msgspec.json):
        copy = encoding.decode(encoding.encode(plan), type=Plan)
        assert copy == plan
        assert copy.digest == digest
    assert plan_of(given, layouts, agents=2).digest == digest
    assert plan_of(given, layouts, agents=1).digest != digest
    assert replace(plan, steps=plan.steps[:-1]).digest != digest


# -- check_plan --------------------------------------------------------------------------------------------------
GIVEN = manifest(1024, 1024, 1024, 1000, 16, dtype=DType.F32)
LAYOUTS = [tensors("t00", "t01", "t02", cut=True), tensors("t02", "t03", "t04")]


def good_plan():
    return plan_of(GIVEN, LAYOUTS, agents=2, ring_bytes=8192, bucket_bytes=4096)


def with_step(index, **fields):
    plan = good_plan()
    steps = list(plan.steps)
    steps[index] = altered(steps[index], **fields)
    return replace(plan, steps=tuple(steps))


def with_piece(index, number, **fields):
    bucket = good_plan().steps[index].bucket
    pieces = list(bucket.pieces)
    pieces[number] = altered(pieces[number], **fields)
    return with_step(index, bucket=altered(bucket, pieces=tuple(pieces)))


def test_a_good_plan_passes():
    check_plan(good_plan(), GIVEN, {number: Wanted(GIVEN, layout) for number, layout in enumerate(LAYOUTS)})
    assert len(good_plan().steps) == 5


UNSAFE = [
    ("structure digest", lambda: replace(good_plan(), structure_digest="0" * 32)),
    ("participants", lambda: replace(good_plan(), agents=0)),
    ("participants", lambda: replace(good_plan(), receivers=3)),
    ("step 1: index", lambda: with_step(1, bucket=Bucket(index=0, size_bytes=0, pieces=()))),
    ("step 0: index", lambda: replace(good_plan(), steps=good_plan().steps[1:])),
    ("step 1: owner", lambda: with_step(1, owner=2)),
    ("step 1: owner", lambda: with_step(1, owner=-1)),
    ("step 2: seq of owner 0", lambda: with_step(2, seq=3)),
    ("step 0: receivers", lambda: with_step(0, receivers=(2,))),
    ("step 2: receivers", lambda: with_step(2, receivers=(1, 0))),
    ("step 2: receivers", lambda: with_step(2, receivers=(1, 1))),
    ("step 0: bytes of the ring", lambda: with_step(0, ring_offset_bytes=-256)),
    ("step 2: bytes of the ring", lambda: with_step(2, ring_offset_bytes=8192)),
    ("step 2: bytes of the ring", lambda: with_step(2, ring_offset_bytes=4000)),
    ("step 4: free_after_seq", lambda: with_step(4, free_after_seq=0)),
    ("step 4: free_after_seq", lambda: with_step(4, free_after_seq=3)),
    ("step 2: free_after_seq", lambda: with_step(2, ring_offset_bytes=0)),
    ("step 0: piece of tensor 5", lambda: with_piece(0, 0, tensor=5)),
    ("step 0: piece of tensor -1", lambda: with_piece(0, 0, tensor=-1)),
    ("step 0: piece of tensor 0", lambda: with_piece(0, 0, size_bytes=1020)),
    ("step 0: piece of tensor 0", lambda: with_piece(0, 3, box=Box(start=(1000,), shape=(256,)))),
    ("step 0: piece of tensor 0", lambda: with_piece(0, 3, box=Box(start=(0,), shape=(0,)), size_bytes=0)),
    ("step 0: piece of tensor 0: offset", lambda: with_piece(0, 1, offset_bytes=0)),
    ("step 0: piece of tensor 0: offset", lambda: with_piece(0, 3, offset_bytes=3073)),
    ("step 0: bucket size", lambda: with_piece(0, 3, offset_bytes=4096)),
    ("tensor 't00'", lambda: with_piece(0, 0, box=Box(start=(256,), shape=(256,)))),
]


@pytest.mark.parametrize(("what", "bad_plan"), UNSAFE)
def test_unsafe_plans_are_refused(what, bad_plan):
    with pytest.raises(PlanError, match=f"^plan: {what}: expected .*, got .*; the plan is not safe"):
        check_plan(bad_plan(), GIVEN)


SQUARE = Manifest(tensors=(TensorMeta(name="a", dtype=DType.U8, shape=(8, 8)),))
LEFT, RIGHT = (Box(start=(0, first), shape=(8, 4)) for first in (0, 4))


def in_parts(*boxes, size_bytes=None):
    """A plan that sends these parts of a square, one bucket each."""
    (step,) = plan_of(SQUARE, [tensors("a")]).steps
    steps = []
    for index, box in enumerate(boxes):
        size = box.size if size_bytes is None else size_bytes
        piece = altered(step.bucket.pieces[0], box=box, size_bytes=size)
        bucket = Bucket(index=index, size_bytes=256, pieces=(piece,))
        steps.append(altered(step, index=index, bucket=bucket, seq=index + 1, ring_offset_bytes=256 * index))
    return replace(plan_of(SQUARE, [tensors("a")]), steps=tuple(steps))


def test_parts_that_are_not_contiguous_travel_packed():
    check_plan(in_parts(LEFT, RIGHT), SQUARE, {0: Wanted(SQUARE, tensors("a"))})
    with pytest.raises(PlanError, match="tensor 'a' for receiver 0"):
        check_plan(in_parts(LEFT), SQUARE, {0: Wanted(SQUARE, tensors("a"))})


@pytest.mark.parametrize("size_bytes", [31, 33, 64, 0, -1])
def test_a_packed_part_of_another_size_is_refused(size_bytes):
    with pytest.raises(PlanError, match="a part of U8"):
        check_plan(in_parts(LEFT, size_bytes=size_bytes), SQUARE)


@pytest.mark.parametrize(
    "other",
    [
        LEFT,
        Box(start=(0, 3), shape=(8, 4)),
        Box(start=(7, 0), shape=(1, 1)),
        Box(start=(2, 0), shape=(3, 8)),
        Box(start=(0, 0), shape=(8, 8)),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_parts_that_overlap_are_refused(other, place):
    boxes = [RIGHT, LEFT]
    boxes.insert(place, other)
    with pytest.raises(PlanError, match="tensor 'a': expected every byte once"):
        check_plan(in_parts(*boxes), SQUARE)


def test_a_receiver_that_would_miss_bytes_is_found():
    plan = with_step(2, receivers=(0,))
    check_plan(plan, GIVEN, {0: Wanted(GIVEN, LAYOUTS[0])})
    with pytest.raises(PlanError, match="tensor 't02' for receiver 1"):
        check_plan(plan, GIVEN, {1: Wanted(GIVEN, LAYOUTS[1])})
    with pytest.raises(PlanError, match="receiver: expected 0 to 1, got 2"):
        check_plan(plan, GIVEN, {2: Wanted(GIVEN, LAYOUTS[1])})
    with pytest.raises(CkptError, match="'gone'"):
        check_plan(plan, GIVEN, {1: Wanted(GIVEN, tensors("gone"))})
    empty = manifest(0, 4)
    with pytest.raises(PlanError, match="tensor 't00' for receiver 0"):
        check_plan(plan_of(empty, [tensors("t01")]), empty, {0: Wanted(empty, tensors("t00"))})


def test_an_empty_tensor_sent_twice_is_found():
    given = manifest(0)
    plan = plan_of(given, [tensors("t00")])
    (step,) = plan.steps
    twice = altered(step, bucket=altered(step.bucket, pieces=step.bucket.pieces * 2))
    with pytest.raises(PlanError, match="every byte once"):
        check_plan(replace(plan, steps=(twice,)), given)
