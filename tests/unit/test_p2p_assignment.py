"""Who reads what from whom, on fleets small enough to see the best assignment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from ckpt_core.errors import PlanError
from ckpt_core.p2p.assignment import Assignment, assign_reads, busiest_s, reassign_reads
from ckpt_core.p2p.fleet import ANYWHERE, Fleet, NicLane, Owner, Receiver
from ckpt_core.p2p.reads import Read, unassigned
from ckpt_core.routing.columns import ints

MIB = 1 << 20
GB = 10**9


def nics(*rates: float, nodes: Sequence[set[int] | None] = ()) -> tuple[NicLane, ...]:
    of = [None if node is None else frozenset(node) for node in nodes] or [None] * len(rates)
    return tuple(
        NicLane(name=f"nic{number}", bytes_per_s=rate, nodes=node)
        for number, (rate, node) in enumerate(zip(rates, of, strict=True))
    )


def owner(name: str, holds: Sequence[int], lanes: tuple[NicLane, ...], **more: object) -> Owner:
    return Owner(name=name, nics=lanes, holds=ints(holds), **more)


def receiver(name: str, wants: Sequence[int], lanes: tuple[NicLane, ...], **more: object) -> Receiver:
    return Receiver(name=name, nics=lanes, wants=ints(wants), **more)


def fleet(owners: Sequence[Owner], receivers: Sequence[Receiver], sizes: Sequence[int]) -> Fleet:
    return Fleet(owners=tuple(owners), receivers=tuple(receivers), sizes_bytes=ints(sizes))


def sent_bytes(assignment: Assignment) -> dict[str, int]:
    """By owner's NIC."""
    sent: dict[str, int] = defaultdict(int)
    for read in assignment.reads:
        one = assignment.fleet.owners[read.owner]
        sent[f"{one.name}/{one.nics[read.owner_nic].name}"] += read.size_bytes
    return dict(sent)


# -- what is chosen ----------------------------------------------------------------------------------------------
def test_one_owner_and_one_receiver() -> None:
    found = assign_reads(fleet([owner("a", [0], nics(10))], [receiver("r", [0], nics(5))], [100]))
    assert list(found.reads) == [
        Read(
            receiver=0,
            piece=0,
            turn=0,
            node=ANYWHERE,
            offset_bytes=0,
            size_bytes=100,
            owner=0,
            owner_nic=0,
            receiver_nic=0,
        )
    ]
    assert (found.busiest_s, found.bound.seconds, found.over_bound) == (20, 20, 1)
    assert (found.bound.size_bytes, found.bound.bytes_per_s, found.bound.lanes) == (100, 5, ("r/nic0",))


def test_replicas_share_by_their_rates() -> None:
    owners = [owner("a", range(40), nics(1 * GB)), owner("b", range(40), nics(2 * GB, 1 * GB))]
    found = assign_reads(fleet(owners, [receiver("r", range(40), nics(100 * GB))], [MIB] * 40))
    assert sent_bytes(found) == {"a/nic0": 10 * MIB, "b/nic0": 20 * MIB, "b/nic1": 10 * MIB}
    assert found.over_bound == 1
    assert found.bound.lanes == ("a/nic0", "b/nic0", "b/nic1")


def test_a_piece_that_only_one_has_leaves_the_others_to_the_rest() -> None:
    owners = [owner("a", range(20), nics(GB)), owner("b", range(10, 20), nics(GB))]
    found = assign_reads(fleet(owners, [receiver("r", range(20), nics(100 * GB))], [MIB] * 20))
    assert sent_bytes(found) == {"a/nic0": 10 * MIB, "b/nic0": 10 * MIB}
    assert (found.reads.owner[:10] == 0).all()


def test_the_bound_names_what_limits() -> None:
    owners = [owner("a", range(12), nics(GB)), owner("b", range(2), nics(GB))]
    found = assign_reads(fleet(owners, [receiver("r", range(12), nics(100 * GB))], [MIB] * 12))
    assert (found.bound.lanes, found.bound.size_bytes) == (("a/nic0",), 10 * MIB)
    assert found.over_bound == 1


def test_a_max_rate_limits_all_nics_of_an_owner_together() -> None:
    owners = [
        owner("a", range(80), nics(10 * GB, 10 * GB), max_bytes_per_s=1.0 * GB),
        owner("b", range(80), nics(3 * GB)),
    ]
    found = assign_reads(fleet(owners, [receiver("r", range(80), nics(100 * GB))], [MIB] * 80))
    sent = sent_bytes(found)
    assert sent["a/nic0"] + sent["a/nic1"] == 20 * MIB
    assert sent["a/nic0"] == sent["a/nic1"]
    assert found.bound.seconds == found.busiest_s == 80 * MIB / (4 * GB)


def test_a_large_piece_is_cut_over_all_nics() -> None:
    case = fleet([owner("a", [0], nics(GB, GB, GB, GB))], [receiver("r", [0], nics(*[GB] * 4))], [64 * MIB])
    found = assign_reads(case)
    assert found.over_bound == 1
    assert sorted(found.reads.size_bytes.tolist()) == [16 * MIB] * 4
    assert len(set(found.reads.owner_nic.tolist())) == len(set(found.reads.receiver_nic.tolist())) == 4
    whole = assign_reads(case, unit_bytes=1 << 30)
    assert (len(whole.reads), whole.over_bound) == (1, 4)


def test_cuts_lie_at_units() -> None:
    case = fleet([owner("a", [0], nics(GB, GB, GB))], [receiver("r", [0], nics(GB, 2 * GB))], [10 * MIB + 5])
    reads = list(assign_reads(case).reads)
    assert [read.offset_bytes % MIB for read in reads] == [0] * len(reads)
    assert sum(read.size_bytes for read in reads) == 10 * MIB + 5
    assert len(reads) > 3


def test_pieces_of_even_sizes_stay_whole() -> None:
    sizes = [7 * MIB + 3] * 64
    owners = [owner(name, range(64), nics(GB, GB)) for name in "abcd"]
    found = assign_reads(fleet(owners, [receiver("r", range(64), nics(*[GB] * 8))], sizes))
    assert len(found.reads) == 64
    assert found.over_bound == 1


def test_lanes_are_even_at_every_point_of_the_order() -> None:
    wants = list(reversed(range(64)))
    owners = [owner(name, range(64), nics(GB)) for name in "abcd"]
    found = assign_reads(fleet(owners, [receiver("r", wants, nics(*[GB] * 4))], [MIB] * 64))
    assert found.reads.piece.tolist() == wants
    for first in range(0, 64, 4):
        assert sorted(found.reads.owner[first : first + 4].tolist()) == [0, 1, 2, 3]
        assert sorted(found.reads.receiver_nic[first : first + 4].tolist()) == [0, 1, 2, 3]


def test_receivers_share_owners() -> None:
    owners = [owner(name, range(30), nics(GB)) for name in "abc"]
    receivers = [receiver(f"r{number}", range(30), nics(GB, GB)) for number in range(4)]
    found = assign_reads(fleet(owners, receivers, [MIB] * 30))
    assert sent_bytes(found) == {f"{name}/nic0": 40 * MIB for name in "abc"}
    assert found.reads.of_receiver(2).piece.tolist() == list(range(30))
    assert found.over_bound == 1


# -- nearness ----------------------------------------------------------------------------------------------------
def test_bytes_cross_only_nics_that_serve_their_memory_node() -> None:
    case = fleet(
        [owner("a", range(8), nics(GB, GB, nodes=[{0}, {1}]), held_at=ints([0] * 6 + [1] * 2))],
        [receiver("r", range(8), nics(GB, GB, nodes=[{0}, None]), wanted_at=ints([0, 1] * 4))],
        [MIB] * 8,
    )
    found = assign_reads(case)
    assert sent_bytes(found) == {"a/nic0": 6 * MIB, "a/nic1": 2 * MIB}
    assert found.bound.lanes == ("a/nic0",)
    for read in found.reads:
        assert read.owner_nic == (0 if read.piece < 6 else 1)
        assert read.node == read.piece % 2
        assert read.receiver_nic == 1 or read.node == 0
    assert np.bincount(found.reads.receiver_nic).tolist() == [4, 4]


def test_bytes_that_are_anywhere_cross_any_nic() -> None:
    case = fleet(
        [owner("a", range(8), nics(GB, GB, nodes=[{0}, {1}]), held_at=ints([0] * 4 + [ANYWHERE] * 4))],
        [receiver("r", range(8), nics(9 * GB))],
        [MIB] * 8,
    )
    assert sent_bytes(assign_reads(case)) == {"a/nic0": 4 * MIB, "a/nic1": 4 * MIB}


# -- again, after a loss -----------------------------------------------------------------------------------------
def three_replicas(pieces: int = 60) -> Fleet:
    owners = [owner(name, range(pieces), nics(GB, GB)) for name in "abc"]
    return fleet(
        owners, [receiver(f"r{number}", range(pieces), nics(*[GB] * 4)) for number in range(2)], [MIB] * pieces
    )


def test_what_is_left_goes_to_those_who_live() -> None:
    found = assign_reads(three_replicas())
    left = found.reads.where(found.reads.turn >= 20)
    again = reassign_reads(found.fleet, left, lost=["b"])
    assert set(again.reads.owner.tolist()) == {0, 2}
    assert again.reads.piece.tolist() == list(range(20, 60)) * 2
    assert again.over_bound == 1
    assert again.bound.seconds == 80 * MIB / (4 * GB)


def test_parts_of_a_piece_that_are_left_become_one_range_again() -> None:
    case = fleet([owner(name, [0], nics(GB)) for name in "abcd"], [receiver("r", [0], nics(8 * GB))], [64 * MIB])
    found = assign_reads(case)
    left = found.reads.where(np.flatnonzero(found.reads.offset_bytes != 16 * MIB))
    assert unassigned(left).offset_bytes.tolist() == [0, 32 * MIB]
    again = reassign_reads(case, left, lost=["a", "b"])
    assert sum(read.size_bytes for read in again.reads) == 48 * MIB
    assert set(again.reads.owner.tolist()) == {2, 3}
    assert again.over_bound == 1


def test_with_nothing_left_there_is_nothing_to_do() -> None:
    found = assign_reads(three_replicas())
    again = reassign_reads(found.fleet, found.reads.where(ints([])), lost=["a", "b", "c"])
    assert (len(again.reads), again.busiest_s, again.bound.seconds, again.over_bound) == (0, 0, 0, 1)


def test_a_piece_that_is_lost_with_its_owner_is_told() -> None:
    case = fleet(
        [owner("a", [0, 1], nics(GB)), owner("b", [1], nics(GB))], [receiver("joiner", [0, 1], nics(GB))], [MIB, MIB]
    )
    found = assign_reads(case)
    with pytest.raises(
        PlanError, match=r"piece 0, wanted by joiner: .* none that holds it among 2; 1 pieces have none: read"
    ):
        reassign_reads(case, found.reads, lost=["a"])
    with pytest.raises(PlanError, match="expected names in the fleet, got c"):
        reassign_reads(case, found.reads, lost=["c"])


# -- what is refused ---------------------------------------------------------------------------------------------
def test_a_piece_that_nobody_has_is_told() -> None:
    with pytest.raises(PlanError, match=r"piece 1, wanted by r: .* none that holds it among 1"):
        assign_reads(fleet([owner("a", [0], nics(GB))], [receiver("r", [0, 1], nics(GB))], [1, 1]))
    with pytest.raises(PlanError, match=r"piece 0, wanted by r: .* none that holds it among 0"):
        assign_reads(fleet([], [receiver("r", [0], nics(GB))], [1]))


def test_a_memory_node_that_no_nic_serves_is_told() -> None:
    far = nics(GB, nodes=[{1}])
    with pytest.raises(PlanError, match=r"only owners whose NICs serve other memory nodes \(a\)"):
        assign_reads(fleet([owner("a", [0], far, held_at=ints([0]))], [receiver("r", [0], nics(GB))], [1]))
    with pytest.raises(
        PlanError, match=r"receiver r: expected a NIC for bytes to memory node 0, got 1 that serve others"
    ):
        assign_reads(fleet([owner("a", [0], nics(GB))], [receiver("r", [0], far, wanted_at=ints([0]))], [1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fleet([], [], [-1]), "expected sizes from 0, got -1"),
        (lambda: fleet([owner("a", [1], nics(1))], [], [1]), "owner a: expected pieces 0 to 0, got 1 to 1"),
        (lambda: fleet([owner("a", [0, 0], nics(1))], [], [1]), "owner a: expected each piece once"),
        (lambda: fleet([owner("a", [0], ())], [], [1]), "owner a: expected a NIC, got none"),
        (
            lambda: fleet([], [receiver("r", [0], nics(0))], [1]),
            "receiver r, NIC nic0: expected bytes a second above 0, got 0",
        ),
        (lambda: fleet([owner("a", [0], nics(1), max_bytes_per_s=-1.0)], [], [1]), "owner a: max rate: expected"),
        (
            lambda: fleet([], [receiver("r", [0], nics(1), wanted_at=ints([]))], [1]),
            "memory node for each of 1 pieces, got 0",
        ),
        (
            lambda: fleet([owner("a", [], nics(1)), owner("a", [], nics(1))], [], [1]),
            "expected names that differ, got a twice",
        ),
        (
            lambda: assign_reads(fleet([owner("a", [0], nics(1))], [receiver("r", [0], nics(1))], [1 << 52])),
            "expected less than 4503599627370496 bytes together, got 4503599627370496",
        ),
        (lambda: assign_reads(fleet([], [], []), unit_bytes=0), "unit: expected at least 1 byte, got 0"),
    ],
)
def test_what_fits_no_fleet_is_refused(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_pieces_without_bytes_are_not_read() -> None:
    found = assign_reads(fleet([owner("a", [0], nics(GB))], [receiver("r", [1, 0], nics(GB))], [MIB, 0]))
    assert found.reads.piece.tolist() == [0]
    assert found.reads.turn.tolist() == [1]
    nothing = assign_reads(fleet([], [receiver("r", [], ())], []))
    assert (len(nothing.reads), nothing.bound.seconds) == (0, 0)


def test_the_busiest_lane_of_any_reads_can_be_asked() -> None:
    found = assign_reads(three_replicas())
    doubled = found.reads.where(np.repeat(np.arange(len(found.reads)), 2))
    assert busiest_s(found.fleet, doubled) == 2 * found.busiest_s
