"""Laws of assignments of reads: every wanted byte exactly once, from owners that hold it, over NICs that may carry it; the bound is
what the worst of all cuts says, nothing is faster, and little is slower."""

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.p2p.assignment import assign_reads, busiest_s, reassign_reads
from ckpt_core.p2p.fleet import ANYWHERE, Fleet, NicLane, Owner, Receiver
from ckpt_core.routing.columns import ints

NODES = (0, 1)
rates = st.sampled_from([1.0, 2.5, 12.5, 25.0, 50.0])


@st.composite
def lanes(draw, *, near, most=3):
    first = NicLane(name="nic0", bytes_per_s=draw(rates))  # serves all: no piece is out of reach
    nodes = st.none() | st.sets(st.sampled_from(NODES), min_size=1).map(frozenset) if near else st.none()
    others = draw(st.lists(st.tuples(rates, nodes), max_size=most - 1))
    return first, *(
        NicLane(name=f"nic{number}", bytes_per_s=rate, nodes=node)
        for number, (rate, node) in enumerate(others, start=1)
    )


def some_nodes(draw, count):
    return ints(draw(st.lists(st.sampled_from([ANYWHERE, *NODES]), min_size=count, max_size=count)))


@st.composite
def fleets(draw, *, most_pieces=12, largest=3000, owners=3, receivers=3):
    """Small enough for all cuts to be tried."""
    near = draw(st.booleans())
    sizes = draw(st.lists(st.integers(0, largest), max_size=most_pieces))
    count = draw(st.integers(1, owners))
    holders = [draw(st.sets(st.integers(0, count - 1), min_size=1)) for _ in sizes]
    holds = [[piece for piece, group in enumerate(holders) if number in group] for number in range(count)]
    wants = draw(st.lists(st.permutations(range(len(sizes))), min_size=1, max_size=receivers))
    wants = [order[: draw(st.integers(0, len(order)))] for order in wants]
    return Fleet(
        owners=tuple(
            Owner(
                name=f"owner{number}",
                nics=draw(lanes(near=near)),
                holds=ints(held),
                held_at=some_nodes(draw, len(held)) if near else None,
                max_bytes_per_s=draw(st.none() | rates),
            )
            for number, held in enumerate(holds)
        ),
        receivers=tuple(
            Receiver(
                name=f"receiver{number}",
                nics=draw(lanes(near=near)),
                wants=ints(wanted),
                wanted_at=some_nodes(draw, len(wanted)) if near else None,
            )
            for number, wanted in enumerate(wants)
        ),
        sizes_bytes=ints(sizes),
    )


def at(nodes, count):
    return [ANYWHERE] * count if nodes is None else nodes.tolist()


def worst_cut(demands, lane_rates, parent_of, limits):
    """Most seconds over all sets of lanes: bytes that may cross nothing else, by what the lanes carry together."""
    worst = 0.0
    for chosen in itertools.product([False, True], repeat=len(lane_rates)):
        inside = {lane for lane, take in enumerate(chosen) if take}
        size = sum(size for size, allowed in demands if allowed <= inside)
        by_parent = {}
        for lane in inside:
            by_parent[parent_of[lane]] = by_parent.get(parent_of[lane], 0.0) + lane_rates[lane]
        if size:
            worst = max(worst, size / sum(min(rate, limits[parent]) for parent, rate in by_parent.items()))
    return worst


def exact_bound(fleet):
    """Of both sides, by trying every cut."""
    sizes = fleet.sizes_bytes.tolist()
    numbered = [(number, nic) for number, owner in enumerate(fleet.owners) for nic in owner.nics]
    held = [dict(zip(o.holds.tolist(), at(o.held_at, len(o.holds)), strict=True)) for o in fleet.owners]
    demands = []
    for piece in itertools.chain(*(one.wants.tolist() for one in fleet.receivers)):
        allowed = {n for n, (o, nic) in enumerate(numbered) if piece in held[o] and nic.serves(held[o][piece])}
        demands.append((sizes[piece], allowed))
    limits = [owner.max_bytes_per_s or float("inf") for owner in fleet.owners]
    worst = worst_cut(demands, [nic.bytes_per_s for _, nic in numbered], [number for number, _ in numbered], limits)
    for one in fleet.receivers:
        nodes = at(one.wanted_at, len(one.wants))
        demands = [
            (sizes[piece], {n for n, nic in enumerate(one.nics) if nic.serves(node)})
            for piece, node in zip(one.wants.tolist(), nodes, strict=True)
        ]
        own = [nic.bytes_per_s for nic in one.nics]
        worst = max(worst, worst_cut(demands, own, [0] * len(own), [float("inf")]))
    return worst


def slowest_byte_s(fleet):
    """Seconds of one byte on the slowest lane: bytes are not divided, so nothing is more exact."""
    slow = [nic.bytes_per_s for one in (*fleet.owners, *fleet.receivers) for nic in one.nics]
    return 1 / min([*slow, *(owner.max_bytes_per_s for owner in fleet.owners if owner.max_bytes_per_s)])


def check_lawful(fleet, reads, wanted, unit_bytes):
    """`wanted`: ranges by receiver and piece, as lists of (start, end)."""
    ranges = {}
    for read in reads:
        owner, receiver = fleet.owners[read.owner], fleet.receivers[read.receiver]
        held = owner.holds.tolist().index(read.piece)
        assert owner.nics[read.owner_nic].serves(at(owner.held_at, len(owner.holds))[held])
        assert receiver.wants[read.turn] == read.piece
        assert read.node == at(receiver.wanted_at, len(receiver.wants))[read.turn]
        assert receiver.nics[read.receiver_nic].serves(read.node)
        assert read.size_bytes > 0
        start, end = read.offset_bytes, read.offset_bytes + read.size_bytes
        ranges.setdefault((read.receiver, read.piece), []).append((start, end))
    assert ranges.keys() == wanted.keys()
    for key, found in ranges.items():
        assert sorted(found) == found
        edges = {edge for one in wanted[key] for edge in one}
        for (_, end), (start, _) in itertools.pairwise(found):
            assert end <= start
            assert start in edges or start % unit_bytes == 0
        assert covered(found) == covered(wanted[key])
    assert (np.diff(reads.receiver) >= 0).all()


def covered(ranges):
    return {byte for start, end in ranges for byte in range(start, end)}


def all_wanted(fleet):
    sizes = fleet.sizes_bytes.tolist()
    return {
        (number, piece): [(0, sizes[piece])]
        for number, one in enumerate(fleet.receivers)
        for piece in one.wants.tolist()
        if sizes[piece]
    }


@given(fleets(), st.sampled_from([1, 16, 100, 1 << 20]))
@settings(deadline=None)
def test_every_wanted_byte_comes_once_from_an_owner_that_has_it(fleet, unit_bytes):
    found = assign_reads(fleet, unit_bytes=unit_bytes)
    check_lawful(fleet, found.reads, all_wanted(fleet), unit_bytes)


@given(fleets(), st.sampled_from([1, 16, 1 << 20]))
@settings(deadline=None)
def test_the_bound_is_the_worst_cut_and_nothing_beats_it(fleet, unit_bytes):
    found = assign_reads(fleet, unit_bytes=unit_bytes)
    exact = exact_bound(fleet)
    assert exact - slowest_byte_s(fleet) <= found.bound.seconds * (1 + 1e-9)
    assert found.bound.seconds <= exact * (1 + 1e-9)
    assert found.busiest_s >= found.bound.seconds * (1 - 1e-9)
    if exact:
        assert found.bound.seconds == found.bound.size_bytes / found.bound.bytes_per_s
        assert found.bound.lanes


@given(fleets(most_pieces=20, largest=200_000, owners=5, receivers=4))
@settings(deadline=None)
def test_with_small_units_it_is_within_five_percent_of_the_bound(fleet):
    found = assign_reads(fleet, unit_bytes=1)
    byte_s = slowest_byte_s(fleet)
    unit_bytes = max(
        1, int(found.bound.seconds / byte_s / 100)
    )  # a hundredth of what the slowest lane carries in that time
    cut = assign_reads(fleet, unit_bytes=unit_bytes)
    assert cut.busiest_s <= cut.bound.seconds * 1.05 + byte_s
    assert found.busiest_s <= found.bound.seconds * (1 + 1e-9) + byte_s  # to the byte


@given(st.integers(0, 1 << 32), st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=25)
def test_fleets_of_usual_sizes_are_within_one_percent_of_the_bound(seed, replicas, limited):
    """With units of 1 MiB: some GB over up to 12 owners and 8 receivers, with uneven holders and NICs of several rates."""
    rng = np.random.default_rng(seed)
    owners, pieces = int(rng.integers(2, 13)), int(rng.integers(100, 400))
    weights = rng.pareto(1.5, owners) + 0.2
    holders = [
        rng.choice(owners, min(replicas, owners), replace=False, p=weights / weights.sum()) for _ in range(pieces)
    ]

    def nics():
        chosen = rng.choice([12.5e9, 25e9, 50e9], int(rng.integers(1, 9))).tolist()
        return tuple(NicLane(name=f"nic{number}", bytes_per_s=rate) for number, rate in enumerate(chosen))

    fleet = Fleet(
        owners=tuple(
            Owner(
                name=f"owner{number}",
                nics=nics(),
                holds=ints([piece for piece, group in enumerate(holders) if number in group]),
                max_bytes_per_s=20e9 if limited else None,
            )
            for number in range(owners)
        ),
        receivers=tuple(
            Receiver(name=f"receiver{number}", nics=nics(), wants=rng.permutation(pieces)[: int(rng.integers(80, 400))])
            for number in range(int(rng.integers(1, 9)))
        ),
        sizes_bytes=rng.integers(1, 64 << 20, pieces),
    )
    found = assign_reads(fleet)
    assert 1 - 1e-9 <= found.over_bound <= 1.01
    assert found.reads.size_bytes.sum() == sum(fleet.sizes_bytes[one.wants].sum() for one in fleet.receivers)


@given(fleets())
@settings(deadline=None)
def test_the_same_fleet_gives_the_same_reads(fleet):
    one, other = assign_reads(fleet, unit_bytes=16), assign_reads(fleet, unit_bytes=16)
    for field in dataclasses.fields(one.reads):
        assert (getattr(one.reads, field.name) == getattr(other.reads, field.name)).all()
    assert one.bound == other.bound


@given(fleets(), st.data())
@settings(deadline=None)
def test_what_is_left_is_assigned_without_the_lost(fleet, data):
    found = assign_reads(fleet, unit_bytes=16)
    lost = data.draw(st.sets(st.sampled_from([owner.name for owner in fleet.owners])))
    alive = [number for number, owner in enumerate(fleet.owners) if owner.name not in lost]
    known = {piece for number in alive for piece in fleet.owners[number].holds.tolist()}
    left = [n for n, read in enumerate(found.reads) if read.piece in known and data.draw(st.booleans())]
    reads = found.reads.where(ints(left))
    again = reassign_reads(fleet, reads, lost=lost, unit_bytes=16)
    wanted = {}
    for read in reads:
        wanted.setdefault((read.receiver, read.piece), []).append(
            (read.offset_bytes, read.offset_bytes + read.size_bytes)
        )
    check_lawful(fleet, again.reads, wanted, 16)
    assert set(again.reads.owner.tolist()) <= set(alive)
    assert again.busiest_s == busiest_s(fleet, again.reads) >= again.bound.seconds * (1 - 1e-9)
