"""Which owner each receiver reads each piece from, and over which two NICs, so that the busiest of all lanes is done first.

Every owner's NIC reaches every receiver's, so the two sides do not depend on each other: any owner's NIC that a range leaves by
goes with any that it comes in by. Each side is a problem of lanes (`lane_flow`), solved exactly for bytes that can be divided at
will; the longer of the two times is the bound. Then ranges are spread (`spreading`): over owners, over the NICs of each, and over
the NICs of each receiver, cut into parts of whole units only where lanes would otherwise take longer than the bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ckpt_core.errors import PlanError
from ckpt_core.p2p.fleet import Fleet
from ckpt_core.p2p.lane_flow import MOST_BYTES, Cut
from ckpt_core.p2p.reads import Reads, joined, unassigned, wanted_reads
from ckpt_core.p2p.sides import Side, inner_sides, owner_side, receiver_sides
from ckpt_core.p2p.spreading import Parts, least_seconds, spread
from ckpt_core.routing.columns import Floats, Ints, ints

UNIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What no assignment can beat, and why.

    Attributes:
        seconds: size_bytes / bytes_per_s: the optimum of bytes that can be divided at will, but for one byte on each lane.
        size_bytes: that must cross the lanes named.
        bytes_per_s: that these carry together; owners' max rates count.
        lanes: NICs, as "owner/NIC" or "receiver/NIC".
    """

    seconds: float
    size_bytes: int
    bytes_per_s: float
    lanes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What every receiver reads.

    Attributes:
        bound: on the time of the busiest lane.
    """

    fleet: Fleet
    reads: Reads
    bound: Bound

    @property
    def busiest_s(self) -> float:
        """Time of the busiest lane: bytes by rate over each NIC, and over each owner's max rate."""
        return busiest_s(self.fleet, self.reads)

    @property
    def over_bound(self) -> float:
        """Busiest lane against the bound: 1 is perfect."""
        return self.busiest_s / self.bound.seconds if self.bound.seconds else 1.0


def assign_reads(fleet: Fleet, *, unit_bytes: int = UNIT_BYTES) -> Assignment:
    """Assign all that the receivers want. The same fleet gives the same reads.

    Args:
        unit_bytes: ranges are cut at multiples of this inside a piece, and no finer. The lanes are even to about one such unit;
            one above the largest piece keeps pieces whole.

    Raises:
        PlanError: a piece that no owner can send, or that no NIC of its receiver can take.
    """
    return _assign(fleet, wanted_reads(fleet), unit_bytes)


def reassign_reads(fleet: Fleet, left: Reads, *, lost: Collection[str], unit_bytes: int = UNIT_BYTES) -> Assignment:
    """Assign again what is left after owners were lost: without them, all of `left` anew, also what had other owners.

    Args:
        fleet: as it was; the numbers of the new reads are the same.
        left: reads not done, of the lost and of others. What is under way stays out of it, and so do its bytes in the bound.
        lost: names of owners.

    Raises:
        PlanError: an unknown name, or a piece that is lost with them.
    """
    if unknown := set(lost) - {owner.name for owner in fleet.owners}:
        raise PlanError(
            f"lost owners: expected names in the fleet, got {', '.join(sorted(unknown))}; name those that it was made of"
        )
    owners = tuple(
        replace(owner, holds=owner.holds[:0], held_at=None) if owner.name in lost else owner for owner in fleet.owners
    )
    return _assign(replace(fleet, owners=owners), unassigned(left), unit_bytes)


def busiest_s(fleet: Fleet, reads: Reads) -> float:
    """Time of the busiest lane of any reads: the most bytes by rate over a NIC, or over an owner's max rate."""
    sent = _seconds(
        [[nic.bytes_per_s for nic in owner.nics] for owner in fleet.owners], reads.owner, reads.owner_nic, reads
    )
    taken = _seconds(
        [[nic.bytes_per_s for nic in one.nics] for one in fleet.receivers], reads.receiver, reads.receiver_nic, reads
    )
    limited = [owner.max_bytes_per_s or np.inf for owner in fleet.owners]
    given = _seconds([[limit] for limit in limited], reads.owner, np.zeros_like(reads.owner), reads)
    return max(float(seconds.max(initial=0.0)) for seconds in (sent, taken, given))


def _seconds(rates: Iterable[Iterable[float]], who: Ints, nic: Ints, reads: Reads) -> Floats:
    """Time of each NIC of all owners, or of all receivers."""
    rows = [list(row) for row in rates]
    first = np.cumsum([0, *(len(row) for row in rows)])
    flat = np.array([rate for row in rows for rate in row], dtype=np.float64)
    carried = np.bincount(first[who] + nic, reads.size_bytes, len(flat))
    seconds: Floats = carried / flat
    return seconds


def _assign(fleet: Fleet, wanted: Reads, unit_bytes: int) -> Assignment:
    if unit_bytes < 1:
        raise PlanError(f"unit: expected at least 1 byte, got {unit_bytes}; 1 MiB is usual")
    if (size := int(wanted.size_bytes.sum())) >= MOST_BYTES:
        raise PlanError(
            f"reads: expected less than {MOST_BYTES} bytes together, got {size}; assign fewer receivers at a time"
        )
    bound = Bound(seconds=0.0, size_bytes=0, bytes_per_s=0.0, lanes=())
    if not len(wanted):
        return Assignment(fleet=fleet, reads=wanted, bound=bound)
    side = owner_side(fleet, wanted)
    for one in receiver_sides(fleet, wanted):
        bound = _larger(bound, one, least_seconds(one.ranges, one.lanes))
    parts, cut = spread(side.ranges, side.lanes, seconds=bound.seconds, unit_bytes=unit_bytes)
    bound = _larger(bound, side, cut)
    reads, group = _cut(wanted, side.rows, parts)
    reads = replace(reads, owner=ints([one.who for one in side.groups])[group])
    inner = _over_nics(reads, inner_sides(fleet, side.groups, reads, group), bound, unit_bytes)
    reads = replace(inner[0], owner_nic=inner[1]).in_order()
    outer = _over_nics(reads, receiver_sides(fleet, reads), bound, unit_bytes)
    reads = replace(outer[0], receiver_nic=outer[1]).in_order()
    return Assignment(fleet=fleet, reads=reads, bound=bound)


def _larger(bound: Bound, side: Side, cut: Cut | None) -> Bound:
    if cut is None or cut.seconds <= bound.seconds:
        return bound
    names = [name for number in np.flatnonzero(cut.lanes) for name in side.groups[number].names]
    return Bound(seconds=cut.seconds, size_bytes=cut.size_bytes, bytes_per_s=cut.bytes_per_s, lanes=tuple(names))


def _over_nics(reads: Reads, sides: Iterable[Side], bound: Bound, unit_bytes: int) -> tuple[Reads, Ints]:
    """Spread reads over the NICs of each side: the reads, and the NIC of each."""
    found, nics = [], []
    for side in sides:
        parts, _ = spread(side.ranges, side.lanes, seconds=bound.seconds, unit_bytes=unit_bytes)
        cut, lane = _cut(reads, side.rows, parts)
        found.append(cut)
        nics.append(np.concatenate([group.nics for group in side.groups])[lane])
    return joined(found), np.concatenate(nics)


def _cut(reads: Reads, rows: Ints, parts: Parts) -> tuple[Reads, Ints]:
    """Reads of these rows, cut into parts, and the lane of each."""
    cut = reads.where(rows[parts.range_number])
    return replace(cut, offset_bytes=cut.offset_bytes + parts.start_bytes, size_bytes=parts.size_bytes), parts.lane
