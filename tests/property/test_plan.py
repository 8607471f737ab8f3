"""Laws of plans: everything needed arrives once and nothing else; the ring is never overwritten too early and never
comes to a stop; owners are loaded evenly."""

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.assign import assign_owners
from ckpt_core.bucket import ALIGN_BYTES
from ckpt_core.dtypes import DType
from ckpt_core.errors import PlanError
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import Plan, check_plan, make_plan
from ckpt_core.wanted import Wanted

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def manifests(draw):
    names = draw(st.lists(st.from_regex(r"[ab]\.[0-9]{1,2}\.[wxyz]", fullmatch=True), unique=True, max_size=8))
    dtypes = st.sampled_from([DType.U8, DType.BF16, DType.F64])
    return Manifest(
        tensors=tuple(TensorMeta(name=name, dtype=draw(dtypes), shape=draw(shapes)) for name in sorted(names))
    )


@st.composite
def entries_for(draw, tensor):
    box = None
    if draw(st.booleans()):
        start = [draw(st.integers(0, extent)) for extent in tensor.shape]
        extents = [draw(st.integers(0, e - first)) for first, e in zip(start, tensor.shape, strict=True)]
        box = Box(start=tuple(start), shape=tuple(extents))
    group = draw(st.sampled_from(["", tensor.name.rpartition(".")[0]]))
    return LayoutEntry(tensor=tensor.name, box=box, group=group, cut=draw(st.booleans()))


@st.composite
def layouts_for(draw, manifest):
    wanted = draw(st.lists(st.sampled_from(manifest.tensors), max_size=10)) if manifest.tensors else []
    return Layout(entries=tuple(draw(entries_for(tensor)) for tensor in wanted))


@st.composite
def problems(draw):
    manifest = draw(manifests())
    layouts = draw(st.lists(layouts_for(manifest), min_size=1, max_size=4))
    plan = make_plan(
        manifest,
        layouts,
        agents=draw(st.integers(1, 4)),
        ring_bytes=draw(st.integers(ALIGN_BYTES, 8 * 4096)),
        bucket_bytes=draw(st.integers(ALIGN_BYTES, 4096)),
    )
    return manifest, layouts, plan


def box_of(entry, tensor):
    return entry.box or Box.whole(tensor.shape)


def count_of(manifest, boxes_by_tensor):
    """How often each element of each tensor is in a box."""
    counts = [np.zeros(tensor.shape, dtype=int) for tensor in manifest.tensors]
    for tensor, box in boxes_by_tensor:
        counts[tensor][box.slices] += 1
    return counts


def needs_of(manifest, layout):
    return [
        (manifest.index_of(entry.tensor), box_of(entry, manifest.tensors[manifest.index_of(entry.tensor)]))
        for entry in layout.entries
    ]


def rows_of(box):
    return set(range(box.start[0], box.stop[0])) if box.shape else {0}


def pieces_of(manifest, steps):
    return [
        (piece.tensor, piece.box or Box.whole(manifest.tensors[piece.tensor].shape))
        for step in steps
        for piece in step.bucket.pieces
    ]


@given(problems())
def test_every_needed_byte_arrives_exactly_once(problem):
    manifest, layouts, plan = problem
    for receiver, layout in enumerate(layouts):
        needs = needs_of(manifest, layout)
        arriving = [step for step in plan.steps if receiver in step.receivers]
        pieces = pieces_of(manifest, arriving)
        needed, arrived = count_of(manifest, needs), count_of(manifest, pieces)
        for tensor, need, arrival in zip(manifest.tensors, needed, arrived, strict=True):
            assert (arrival <= 1).all()
            assert (arrival[need > 0] == 1).all(), tensor.name
        empty = {tensor for tensor, _ in needs if not manifest.tensors[tensor].size_bytes}
        assert empty <= {tensor for tensor, _ in pieces}, "empty tensors arrive too"
        expected = sum(
            int((need > 0).sum()) * tensor.dtype.itemsize for tensor, need in zip(manifest.tensors, needed, strict=True)
        )
        assert plan.bytes_needed_by_receiver[receiver] == expected


@given(problems())
def test_nothing_is_sent_that_nobody_needs(problem):
    manifest, layouts, plan = problem
    needs = [need for layout in layouts for need in needs_of(manifest, layout)]
    may_cut = {manifest.index_of(e.tensor): True for layout in layouts for e in layout.entries}
    for layout in layouts:
        for entry in layout.entries:
            index = manifest.index_of(entry.tensor)
            empty = entry.box is not None and not entry.box.size and manifest.tensors[index].size_bytes
            may_cut[index] = may_cut[index] and (entry.cut or bool(empty))
    for step in plan.steps:
        receiving = set()
        for piece in step.bucket.pieces:
            tensor = manifest.tensors[piece.tensor]
            part = piece.box or Box.whole(tensor.shape)
            assert may_cut[piece.tensor] or piece.box is None
            assert part.is_contiguous_in(tensor.shape)
            assert piece.size_bytes == part.size * tensor.dtype.itemsize
            users = {
                receiver
                for receiver, layout in enumerate(layouts)
                for index, box in needs_of(manifest, layout)
                if index == piece.tensor and (not tensor.size_bytes or not box.disjoint(part))
            }
            assert users
            receiving |= users
            if may_cut[piece.tensor] and tensor.size_bytes:
                needed = [rows_of(box) for index, box in needs if index == piece.tensor and box.size]
                assert rows_of(part) <= set().union(*needed)
        assert step.receivers == tuple(sorted(receiving))


@given(problems())
def test_own_plans_pass_the_check_and_travel(problem):
    manifest, layouts, plan = problem
    check_plan(plan, manifest, {number: Wanted(manifest, layout) for number, layout in enumerate(layouts)})
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan)
    assert copy == plan
    assert copy.digest == plan.digest
    assert plan.size_bytes == sum(plan.bytes_by_owner)


@given(problems())
def test_buckets_are_bounded_and_groups_stay_together(problem):
    manifest, layouts, plan = problem
    group_of = {}
    for layout in layouts:
        for entry in layout.entries:
            group_of[entry.tensor] = group_of.get(entry.tensor) or entry.group
    seen = []
    for step in plan.steps:
        sizes = [piece.size_bytes for piece in step.bucket.pieces]
        assert step.bucket.size_bytes % ALIGN_BYTES == 0
        assert step.bucket.size_bytes <= plan.bucket_bytes or len(sizes) == 1
        for piece in step.bucket.pieces:
            if piece.box is not None:
                assert piece.size_bytes <= max(plan.bucket_bytes // 4, ALIGN_BYTES)
            name = manifest.tensors[piece.tensor].name
            label = group_of[name] or name
            if seen[-1:] != [label]:
                seen.append(label)
    assert len(seen) == len(set(seen)), "a group is never interleaved with another"


# -- the ring at work --------------------------------------------------------------------------------------------
class Simulation:
    """Owners fill and receivers read at random speeds, by the rules that steps state and nothing else.

    Each byte of a ring holds the seq that was written there last. A fill takes two moves, so that a write that
    comes too early is seen by a reader that is in the middle of a bucket.
    """

    def __init__(self, plan, seed):
        self.plan = plan
        self.random = random.Random(seed)
        self.rings = [np.zeros(plan.ring_bytes, dtype=np.int64) for _ in range(plan.agents)]
        self.mine = [[step for step in plan.steps if step.owner == owner] for owner in range(plan.agents)]
        self.filling = [0] * plan.agents
        self.half = [False] * plan.agents
        self.published = [0] * plan.agents
        self.at = [0] * plan.receivers
        self.reading = [False] * plan.receivers
        self.done = [[0] * plan.receivers for _ in range(plan.agents)]
        self.read = [[] for _ in range(plan.receivers)]

    def run(self):
        actors = [(self.move_owner, owner) for owner in range(self.plan.agents)]
        actors += [(self.move_receiver, receiver) for receiver in range(self.plan.receivers)]
        speeds = [self.random.choice([1, 5, 25]) for _ in actors]
        while not self.finished():
            tried = self.random.choices(actors, speeds, k=3)
            if not any(move(who) for move, who in tried):
                assert any(move(who) for move, who in actors), "nobody can move: deadlock"

    def finished(self):
        return all(at == len(self.plan.steps) for at in self.at)

    def move_owner(self, owner):
        if self.filling[owner] == len(self.mine[owner]):
            return False
        step = self.mine[owner][self.filling[owner]]
        if min(self.done[owner]) < step.free_after_seq:
            return False
        middle = step.ring_offset_bytes + step.bucket.size_bytes // 2
        end = step.ring_offset_bytes + step.bucket.size_bytes
        if not self.half[owner]:
            self.rings[owner][step.ring_offset_bytes : middle] = step.seq
            self.half[owner] = True
            return True
        self.rings[owner][middle:end] = step.seq
        self.half[owner] = False
        self.published[owner] = step.seq
        self.filling[owner] += 1
        return True

    def move_receiver(self, receiver):
        if self.at[receiver] == len(self.plan.steps):
            return False
        step = self.plan.steps[self.at[receiver]]
        if receiver in step.receivers:
            if self.published[step.owner] < step.seq:
                return False
            found = self.rings[step.owner][step.ring_offset_bytes :][: step.bucket.size_bytes]
            assert (found == step.seq).all(), "overwritten before it was read"
            self.reading[receiver] = not self.reading[receiver]
            if self.reading[receiver]:
                return True
            self.read[receiver].append(step.index)
        self.done[step.owner][receiver] = step.seq
        self.at[receiver] += 1
        return True


@given(problems(), st.integers(0, 2**32))
def test_the_ring_is_safe_and_never_stops_at_any_speeds(problem, seed):
    _, layouts, plan = problem
    simulation = Simulation(plan, seed)
    simulation.run()
    for receiver in range(len(layouts)):
        assert simulation.read[receiver] == [step.index for step in plan.steps if receiver in step.receivers]


def test_the_simulation_sees_a_ring_that_does_not_wait():
    """The law above can fail: without the waits, the same simulation finds torn buckets, and so does the check."""
    manifest = Manifest(tensors=tuple(TensorMeta(name=f"t{i}", dtype=DType.U8, shape=(1000,)) for i in range(9)))
    layout = Layout(entries=tuple(LayoutEntry(tensor=tensor.name) for tensor in manifest.tensors))
    plan = make_plan(manifest, [layout] * 2, agents=1, ring_bytes=2048, bucket_bytes=1024)
    hasty = replace(plan, steps=tuple(msgspec.structs.replace(step, free_after_seq=0) for step in plan.steps))
    with pytest.raises(PlanError, match="free_after_seq"):
        check_plan(hasty, manifest)
    caught = 0
    for seed in range(20):
        try:
            Simulation(hasty, seed).run()
        except AssertionError as error:
            caught += "overwritten before it was read" in str(error)
    assert caught > 10


# -- owners ------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 1000)), st.integers(1, 9))
def test_owners_are_loaded_evenly_at_every_point(sizes, agents):
    owners = assign_owners(sizes, agents)
    loads = [0] * agents
    for position, (size, owner) in enumerate(zip(sizes, owners, strict=True)):
        loads[owner] += size
        assert max(loads) - min(loads) <= max(sizes[: position + 1])
