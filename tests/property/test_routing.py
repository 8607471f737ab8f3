"""Laws of routed plans: each byte that a host's ranks need enters it exactly once and nothing else does; every rank finds
its slices; lanes carry what is stated, and no plan beats the lower bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.bucket import ALIGN_BYTES, natural_key
from ckpt_core.dtypes import DType
from ckpt_core.errors import CapacityError, CoverageError, PlanError
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.routing.bounds import LaneKind
from ckpt_core.routing.cells import cells
from ckpt_core.routing.columns import ints
from ckpt_core.routing.lanes import NONE, deal
from ckpt_core.routing.needs import ClassNeeds
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.routed import make_routed_plan
from ckpt_core.routing.topology import Topology, striped, uniform
from ckpt_core.routing.views import of_host, of_rank

shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)


@st.composite
def manifests(draw):
    names = draw(st.lists(st.from_regex(r"[ab]\.[0-9]{1,2}\.[wxyz]", fullmatch=True), unique=True, max_size=8))
    dtypes = st.sampled_from([DType.U8, DType.BF16, DType.F64])
    return Manifest(
        tensors=tuple(TensorMeta(name=name, dtype=draw(dtypes), shape=draw(shapes)) for name in sorted(names))
    )


@st.composite
def boxes_in(draw, shape):
    start = [draw(st.integers(0, extent)) for extent in shape]
    size = [draw(st.integers(0, extent - first)) for first, extent in zip(start, shape, strict=True)]
    return Box(start=tuple(start), shape=tuple(size))


@st.composite
def layouts_for(draw, manifest):
    wanted = draw(st.lists(st.sampled_from(manifest.tensors), max_size=10)) if manifest.tensors else []
    return Layout(
        entries=tuple(
            LayoutEntry(tensor=meta.name, box=draw(st.none() | boxes_in(meta.shape)), cut=True) for meta in wanted
        )
    )


@st.composite
def topologies_for(draw, manifest, classes):
    hosts = draw(st.integers(1, 5))
    ranks = draw(st.integers(1, 8))
    rank_host = ints([draw(st.integers(0, hosts - 1)) for _ in range(ranks)])
    sets = draw(st.lists(st.sets(st.integers(0, hosts - 1), min_size=1).map(sorted).map(tuple), min_size=1, max_size=4))
    rates = st.floats(1, 100)
    return Topology(
        rank_host=rank_host,
        rank_class=ints([draw(st.integers(0, classes - 1)) for _ in range(ranks)]),
        nics=ints([draw(st.integers(1, 4)) for _ in range(hosts)]),
        nic_gb_s=np.array([draw(rates) for _ in range(hosts)]),
        gpus=ints([draw(st.integers(1, 4)) for _ in range(hosts)]),
        pcie_gb_s=np.array([draw(rates) for _ in range(hosts)]),
        holder_sets=tuple(sets),
        holder_of=ints([draw(st.integers(0, len(sets) - 1)) for _ in manifest.tensors]),
    )


@st.composite
def problems(draw):
    manifest = draw(manifests())
    layouts = draw(st.lists(layouts_for(manifest), min_size=1, max_size=4))
    topology = draw(topologies_for(manifest, len(layouts)))
    plan = make_routed_plan(
        manifest,
        [ClassNeeds.of(layout, manifest) for layout in layouts],
        topology,
        bucket_bytes=draw(st.none() | st.integers(ALIGN_BYTES, 4096)),
    )
    return manifest, layouts, topology, plan


def count(manifest, boxes):
    counts = [np.zeros(meta.shape, dtype=int) for meta in manifest.tensors]
    for tensor, box in boxes:
        counts[tensor][box.slices] += 1
    return counts


def needs_of(manifest, layout):
    found = []
    for entry in layout.entries:
        index = manifest.index_of(entry.tensor)
        found.append((index, entry.box or Box.whole(manifest.tensors[index].shape)))
    return found


def boxes_of(plan, piece_numbers):
    pieces = plan.packed.pieces
    return [(int(pieces.tensor[p]), pieces.boxes[pieces.box[p]]) for p in piece_numbers]


def pieces_of(plan, buckets):
    first = plan.packed.first_piece
    return [piece for bucket in buckets for piece in range(first[bucket], first[bucket + 1])]


@given(problems())
@settings(deadline=None)
def test_each_needed_byte_enters_a_host_once_and_nothing_else_does(problem):
    manifest, layouts, topology, plan = problem
    for host in range(topology.hosts):
        classes = {int(c) for c, h in zip(topology.rank_class, topology.rank_host, strict=True) if h == host}
        needed = count(manifest, [need for number in classes for need in needs_of(manifest, layouts[number])])
        arrived = count(manifest, boxes_of(plan, pieces_of(plan, of_host(plan, host).buckets)))
        for meta, need, arrival in zip(manifest.tensors, needed, arrived, strict=True):
            assert (arrival == (need > 0)).all(), meta.name


@given(problems())
@settings(deadline=None)
def test_each_rank_takes_each_byte_it_needs_once(problem):
    manifest, layouts, topology, plan = problem
    pieces = plan.packed.pieces
    for rank in range(topology.ranks):
        view = of_rank(plan, manifest, rank)
        taken = [(int(pieces.tensor[p]), view.boxes[b]) for p, b in zip(view.piece, view.box, strict=True)]
        for (_, part), piece in zip(taken, view.piece, strict=True):
            assert pieces.boxes[pieces.box[piece]].contains(part)
        needed = count(manifest, needs_of(manifest, layouts[topology.rank_class[rank]]))
        for need, arrival in zip(needed, count(manifest, taken), strict=True):
            assert (arrival == (need > 0)).all()
        empty = {t for t, _ in needs_of(manifest, layouts[topology.rank_class[rank]])}
        assert {t for t in empty if not manifest.tensors[t].size_bytes} <= {t for t, _ in taken}
        assert set(view.bucket) <= set(of_host(plan, int(topology.rank_host[rank])).buckets)


@given(problems())
@settings(deadline=None)
def test_every_bucket_follows_a_chain_from_a_host_that_has_it(problem):
    _, _, topology, plan = problem
    views = [of_host(plan, host) for host in range(topology.hosts)]
    for bucket in range(plan.buckets):
        holders = topology.holder_sets[plan.packed.holders[bucket]]
        receivers = {view.host for view in views if bucket in view.buckets}
        owner = int(plan.lanes.owner[bucket])
        remote = receivers - set(holders)
        assert set(plan.local(bucket)) == receivers & set(holders)
        if not remote:
            assert owner == NONE
            continue
        assert owner in holders
        at, before = int(views[owner].sends_to[list(views[owner].sends).index(bucket)]), owner
        reached = []
        while at != NONE:
            place = list(views[at].buckets).index(bucket)
            assert views[at].sender[place] == before
            reached.append(at)
            before, at = at, int(views[at].next_host[place])
        assert sorted(reached) == sorted(remote)
        assert reached == list(plan.chain(bucket))


@given(problems())
@settings(deadline=None)
def test_lanes_carry_what_hosts_do_and_no_lane_is_there_twice(problem):
    _, _, topology, plan = problem
    sizes = plan.packed.size_bytes
    carried = {kind: np.zeros_like(plan.lanes.nic_in_bytes) for kind in (LaneKind.NIC_IN, LaneKind.NIC_OUT)}
    pcie = np.zeros_like(plan.lanes.pcie_bytes)
    for host in range(topology.hosts):
        view = of_host(plan, host)
        for bucket, nic, gpu, following in zip(view.buckets, view.nic, view.gpu, view.next_host, strict=True):
            assert 0 <= gpu < topology.gpus[host]
            pcie[host, gpu] += sizes[bucket]
            if nic != NONE:
                assert 0 <= nic < topology.nics[host]
                carried[LaneKind.NIC_IN][host, nic] += sizes[bucket]
                if following != NONE:
                    carried[LaneKind.NIC_OUT][host, nic] += sizes[bucket]
        for bucket, nic in zip(view.sends, view.sends_nic, strict=True):
            assert 0 <= nic < topology.nics[host]
            carried[LaneKind.NIC_OUT][host, nic] += sizes[bucket]
    assert (carried[LaneKind.NIC_IN] == plan.lanes.nic_in_bytes).all()
    assert (carried[LaneKind.NIC_OUT] == plan.lanes.nic_out_bytes).all()
    assert (pcie == plan.lanes.pcie_bytes).all()


@given(problems())
@settings(deadline=None)
def test_no_plan_beats_the_lower_bound(problem):
    plan = problem[-1]
    for kind, busiest in plan.busiest_s().items():
        assert busiest >= plan.demand.lower_bound_s[kind] * (1 - 1e-9)


@given(problems())
@settings(deadline=None)
def test_buckets_hold_their_pieces_without_overlap(problem):
    manifest, _, _, plan = problem
    packed = plan.packed
    for bucket in range(plan.buckets):
        end = 0
        for piece in pieces_of(plan, [bucket]):
            assert packed.offset_bytes[piece] >= end
            assert packed.offset_bytes[piece] % ALIGN_BYTES == 0
            ((tensor, box),) = boxes_of(plan, [piece])
            assert packed.pieces.size_bytes[piece] == box.size * manifest.tensors[tensor].dtype.itemsize
            end = packed.offset_bytes[piece] + packed.pieces.size_bytes[piece]
        assert end <= packed.size_bytes[bucket] <= max(plan.bucket_bytes, 2 * ALIGN_BYTES)


# -- the parts -----------------------------------------------------------------------------------------------------
@given(st.data())
@settings(deadline=None)
def test_cells_are_disjoint_and_say_who_needs_them(data):
    shape = data.draw(shapes)
    needed = data.draw(st.lists(st.lists(boxes_in(shape), max_size=3), min_size=1, max_size=4))
    found = cells(shape, needed)
    wants = [np.zeros(shape, dtype=bool) for _ in needed]
    for want, boxes in zip(wants, needed, strict=True):
        for box in boxes:
            want[box.slices] = True
    seen = np.zeros(shape, dtype=int)
    for box, mask in found:
        seen[box.slices] += 1
        for who, want in enumerate(wants):
            assert (want[box.slices] == bool(mask >> who & 1)).all()
    assert (seen == np.any(wants, axis=0)).all()


def test_a_column_cut_is_one_cell():
    halves = [[Box(start=(0, 0), shape=(8, 4))], [Box(start=(0, 4), shape=(8, 4))]]
    assert cells((8, 8), halves) == [(halves[0][0], 1), (halves[1][0], 2)]


@given(st.lists(st.from_regex(r"[a-c0-9\n]{0,3}(\.[a-c0-9]{0,3}){0,3}", fullmatch=True), unique=True, max_size=20))
def test_natural_order_is_that_of_buckets(names):
    metas = tuple(TensorMeta(name=name, dtype=DType.U8, shape=()) for name in sorted(names))
    manifest = Manifest(tensors=metas)
    ordered = [metas[index].name for index in natural_order(manifest)]
    assert sorted(ordered) == sorted(names)
    keys = [natural_key(name) for name in ordered]
    assert keys == sorted(keys)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), max_size=200), st.integers(1, 8))
def test_lanes_are_even_in_each_group(buckets, lanes):
    sizes, groups = ints([size for size, _ in buckets]), ints([group for _, group in buckets])
    dealt = deal(sizes, groups, lanes)
    for group in set(groups.tolist()):
        loads = [int(sizes[(groups == group) & (dealt == lane)].sum()) for lane in range(lanes)]
        assert max(loads) - min(loads) <= 1.5 * sizes.max()


# -- how good it is, on a cluster of plain numbers ----------------------------------------------------------------
def halves(layers):
    """A model whose ranks 0 to 7 need the upper half of each tensor and 8 to 15 the lower, beside a shared one."""
    metas = [TensorMeta(name=f"layers.{n}.{w}", dtype=DType.U8, shape=(512, 1024)) for n in range(layers) for w in "ab"]
    metas += [TensorMeta(name=f"layers.{n}.norm", dtype=DType.U8, shape=(4096,)) for n in range(layers)]
    manifest = Manifest(tensors=tuple(sorted(metas, key=lambda meta: meta.name)))
    needs = []
    for rank in range(16):
        columns = {"b": Box(start=(0, 64 * rank), shape=(512, 64)), "a": Box(start=(32 * rank, 0), shape=(32, 1024))}
        entries = [
            LayoutEntry(tensor=m.name, box=columns.get(m.name.rpartition(".")[2]), cut=True) for m in manifest.tensors
        ]
        needs.append(ClassNeeds.of(Layout(entries=tuple(entries)), manifest))
    return manifest, needs


@pytest.mark.parametrize("placement", ["striped", "runs", "one trainer", "everybody has all", "two have all"])
@pytest.mark.parametrize("ranks", [16, 64])
def test_the_busiest_lane_is_within_five_percent_of_the_bound(placement, ranks):
    manifest, needs = halves(400)
    order = natural_order(manifest)
    hosts, more = ranks // 8, int(placement == "one trainer")
    count = len(manifest.tensors)
    sets, holder_of = {
        "striped": ([(h,) for h in range(hosts)], striped(manifest, order, hosts, stripe_bytes=4 << 20)),
        "runs": ([(h,) for h in range(hosts)], striped(manifest, order, hosts, stripe_bytes=1 << 40)),
        "one trainer": ([(hosts,)], np.zeros(count, dtype=np.int64)),
        "everybody has all": ([tuple(range(hosts))], np.zeros(count, dtype=np.int64)),
        "two have all": ([(0, 1)], np.zeros(count, dtype=np.int64)),
    }[placement]
    topology = uniform(
        ranks=ranks, ranks_per_host=8, classes=16, holder_sets=sets, holder_of=holder_of, more_hosts=more
    )
    plan = make_routed_plan(manifest, needs, topology)
    assert 1 <= plan.busiest_over_bound <= 1.05
    if placement == "everybody has all":
        assert not plan.lanes.nic_in_bytes.any()
    assert make_routed_plan(manifest, needs, topology).digest() == plan.digest()


def test_what_cannot_be_planned_is_refused():
    manifest, needs = halves(1)
    topology = uniform(ranks=16, ranks_per_host=8, classes=16, holder_sets=[(0,)], holder_of=ints([0] * 3), nics=0)
    with pytest.raises(CapacityError, match="expected a NIC"):
        make_routed_plan(manifest, needs, topology)
    with pytest.raises(CapacityError, match="classes 0 to 3"):
        make_routed_plan(manifest, needs[:4], topology)
    uneven = uniform(ranks=16, ranks_per_host=8, classes=16, holder_sets=[(0,)], holder_of=ints([0]))
    with pytest.raises(CapacityError, match="holder for each of 3 tensors"):
        make_routed_plan(manifest, needs, uneven)
    wide = ClassNeeds(tensors=ints([0]), parts=ints([0]), boxes=(Box(start=(0, 0), shape=(512, 2048)),))
    with pytest.raises(CoverageError, match="inside"):
        make_routed_plan(manifest, [wide] * 16, topology)
    with pytest.raises(CapacityError, match="hosts 0 to 1"):
        uniform(ranks=16, ranks_per_host=8, classes=16, holder_sets=[(7,)], holder_of=ints([0] * 3))
    well = uniform(ranks=16, ranks_per_host=8, classes=16, holder_sets=[(0,)], holder_of=ints([0] * 3))
    plan = make_routed_plan(manifest, needs, well)
    with pytest.raises(PlanError, match="host: expected 0 to 1, got 2"):
        of_host(plan, 2)
    with pytest.raises(PlanError, match="rank: expected 0 to 15, got 16"):
        of_rank(plan, manifest, 16)
