"""Assignments of reads to owners and NICs: this project's, against checkpoint-engine's rule and the bound, on random topologies.

    python benchmarks/p2p_assignment.py --out results.json [--topologies 200]

The measure is the busiest lane: bytes by rate over each NIC, of owners and of receivers. That flatters the rule, which goes in
rounds that wait for their slowest read; here these waits cost nothing. Pieces are its buckets. Each has one owner there, so of
several replicas it is given one, dealt evenly; joining hosts use it each for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ckpt_core.p2p.assignment import assign_reads, busiest_s
from ckpt_core.p2p.fleet import Fleet, NicLane, Owner, Receiver
from ckpt_core.p2p.reads import Reads, wanted_reads
from ckpt_core.routing.columns import ints

GB, MIB = 1e9, 1 << 20
WHOLE = 1 << 50  # a unit that no piece reaches
NEAR = 1.05
SAME = 1 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is random in a kind of topology. Owners are agents with one NIC each, as the rule knows them.

    Attributes:
        random_sizes: pieces of 4 to 64 MiB, else all of 32 MiB.
        uneven: owners hold very different numbers of pieces, else the same.
        mixed_rates: NICs of 12.5, 25 and 50 GB/s, else all of 50.
        replicas: most owners of a piece.
        receivers: most joining hosts.
        few: about three pieces an owner, else about sixty.
    """

    name: str
    random_sizes: bool = True
    uneven: bool = False
    mixed_rates: bool = False
    replicas: int = 1
    receivers: int = 1
    few: bool = False


FAMILIES = (
    Family(name="even sizes", random_sizes=False),
    Family(name="random sizes"),
    Family(name="few pieces", few=True),
    Family(name="uneven owners", uneven=True),
    Family(name="NICs of several rates", mixed_rates=True),
    Family(name="replicas", replicas=4, uneven=True),
    Family(name="several joining hosts", receivers=6),
    Family(name="all of these", uneven=True, mixed_rates=True, replicas=4, receivers=6),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One topology. Seconds are of the busiest lane.

    Attributes:
        whole_s: this project's assignment when pieces may not be cut.
        reads: of this project's assignment; `wanted` of them would do without cuts.
        assign_s: time to make it.
    """

    family: str
    seed: int
    owners: int
    receivers: int
    receiver_nics: int
    pieces: int
    size_gb: float
    bound_s: float
    ours_s: float
    whole_s: float
    rule_s: float
    wanted: int
    reads: int
    assign_s: float


def topology(family: Family, seed: int) -> Fleet:
    """One of a family."""
    rng = np.random.default_rng(seed)
    owners = int(rng.integers(2, 33))
    pieces = owners * int(rng.integers(2, 5) if family.few else rng.integers(40, 81))
    sizes = rng.integers(4 * MIB, 64 * MIB, pieces) if family.random_sizes else np.full(pieces, 32 * MIB)
    weights = rng.pareto(1.5, owners) + 0.2 if family.uneven else np.ones(owners)
    first = np.sort(rng.choice(owners, pieces, p=weights / weights.sum())) if family.uneven else _dealt(pieces, owners)
    holders = [_holders(rng, int(owner), owners, family.replicas) for owner in first]
    wants = ints(range(pieces))
    return Fleet(
        owners=tuple(
            Owner(
                name=f"agent{number}",
                nics=_nics(rng, 1, family),
                holds=ints([p for p, group in enumerate(holders) if number in group]),
            )
            for number in range(owners)
        ),
        receivers=tuple(
            Receiver(name=f"host{number}", nics=_nics(rng, int(rng.integers(1, 9)), family), wants=wants)
            for number in range(int(rng.integers(2, family.receivers + 1)) if family.receivers > 1 else 1)
        ),
        sizes_bytes=ints(sizes.tolist()),
    )


def _dealt(pieces: int, owners: int) -> np.ndarray:
    return np.sort(np.arange(pieces) % owners)


def _holders(rng: np.random.Generator, first: int, owners: int, most: int) -> set[int]:
    more = int(rng.integers(0, most))
    return {first, *rng.choice(owners, min(more, owners), replace=False).tolist()}


def _nics(rng: np.random.Generator, count: int, family: Family) -> tuple[NicLane, ...]:
    rates = rng.choice([12.5, 25.0, 50.0], count) if family.mixed_rates else np.full(count, 50.0)
    return tuple(NicLane(name=f"mlx5_{n}", bytes_per_s=float(rate) * GB) for n, rate in enumerate(rates))


# -- the rule ---------------------------------------------------------------------------------------------------------------
def rule_reads(fleet: Fleet) -> Reads:
    """checkpoint-engine's assignment, written anew from what it does (its issue 25, and ps.py of 0.4.2).

    Buckets are queued by the NIC of their owner, and the queues are served in turn, one bucket each. Receivers are the first
    rank of each NIC, no more than there are owners' NICs. In each round they take the next bucket one after the other; the round
    ends early before an owner's NIC would serve twice in it.
    """
    owner = _one_owner(fleet)
    by_owner: dict[int, deque[int]] = {}
    for piece, who in enumerate(owner):
        by_owner.setdefault(who, deque()).append(piece)
    served = list(_in_turn(list(by_owner.values())))
    nic_of = [_rounds(served, owner, min(len(one.nics), len(by_owner))) for one in fleet.receivers]
    wanted = wanted_reads(fleet)
    return Reads(
        receiver=wanted.receiver,
        piece=wanted.piece,
        turn=wanted.turn,
        node=wanted.node,
        offset_bytes=wanted.offset_bytes,
        size_bytes=wanted.size_bytes,
        owner=ints(owner)[wanted.piece],
        owner_nic=np.zeros_like(wanted.piece),
        receiver_nic=ints([nic_of[r][p] for r, p in zip(wanted.receiver.tolist(), wanted.piece.tolist(), strict=True)]),
    )


def _one_owner(fleet: Fleet) -> list[int]:
    """Of each piece: of its holders the one that was given the fewest so far."""
    holders: list[list[int]] = [[] for _ in range(fleet.pieces)]
    for number, owner in enumerate(fleet.owners):
        for piece in owner.holds.tolist():
            holders[piece].append(number)
    given = [0] * len(fleet.owners)
    chosen = []
    for group in holders:
        who = min(group, key=given.__getitem__)
        given[who] += 1
        chosen.append(who)
    return chosen


def _in_turn(queues: Sequence[deque[int]]) -> Iterator[int]:
    while any(queues):
        for queue in queues:
            if queue:
                yield queue.popleft()


def _rounds(served: Sequence[int], owner: Sequence[int], receivers: int) -> dict[int, int]:
    """NIC of the receiver for each piece."""
    nic: dict[int, int] = {}
    waiting = deque(served)
    while waiting:
        busy: set[int] = set()
        for receiver in range(receivers):
            if not waiting or owner[waiting[0]] in busy:
                break
            piece = waiting.popleft()
            busy.add(owner[piece])
            nic[piece] = receiver
    return nic


# -- measuring --------------------------------------------------------------------------------------------------------------
def measure(family: Family, seed: int) -> Result:
    """One topology by all ways."""
    fleet = topology(family, seed)
    began = time.perf_counter()
    ours = assign_reads(fleet)
    took = time.perf_counter() - began
    wanted = len(wanted_reads(fleet))
    return Result(
        family=family.name,
        seed=seed,
        owners=len(fleet.owners),
        receivers=len(fleet.receivers),
        receiver_nics=sum(len(one.nics) for one in fleet.receivers),
        pieces=fleet.pieces,
        size_gb=int(fleet.sizes_bytes.sum()) / GB,
        bound_s=ours.bound.seconds,
        ours_s=ours.busiest_s,
        whole_s=assign_reads(fleet, unit_bytes=WHOLE).busiest_s,
        rule_s=busiest_s(fleet, rule_reads(fleet)),
        wanted=wanted,
        reads=len(ours.reads),
        assign_s=took,
    )


def measure_scale(repeats: int = 3) -> dict[str, Any]:
    """64 owners and 64 receivers of 8 NICs, 5000 pieces in three replicas, which all receivers want."""
    rng = np.random.default_rng(0)
    pieces, hosts, family = 5000, 64, Family(name="scale")
    holds: list[list[int]] = [[] for _ in range(hosts)]
    for piece in range(pieces):
        for owner in rng.choice(hosts, 3, replace=False).tolist():
            holds[owner].append(piece)
    fleet = Fleet(
        owners=tuple(Owner(name=f"a{n}", nics=_nics(rng, 8, family), holds=ints(held)) for n, held in enumerate(holds)),
        receivers=tuple(
            Receiver(name=f"r{n}", nics=_nics(rng, 8, family), wants=ints(range(pieces))) for n in range(hosts)
        ),
        sizes_bytes=ints(rng.integers(4 * MIB, 64 * MIB, pieces).tolist()),
    )
    took = []
    for _ in range(repeats):
        began = time.process_time()
        found = assign_reads(fleet)
        took.append(time.process_time() - began)
    return {
        "owners": hosts,
        "receivers": hosts,
        "nics": 8,
        "pieces": pieces,
        "reads": len(found.reads),
        "cpu_s": took,
        "over_bound": found.over_bound,
    }


def summary(results: Sequence[Result]) -> str:
    """One line of all."""
    over = [result.ours_s / result.bound_s for result in results]
    rule = [result.rule_s / result.bound_s for result in results]
    worse = sum(result.ours_s > result.rule_s * SAME for result in results)
    behind = [ratio for ratio in rule if ratio > NEAR]
    near = sum(ratio <= NEAR for ratio in over)
    return (
        f"{len(results)} topologies: never worse than the rule in {len(results) - worse}, within 5 % of the bound in {near} (worst "
        f"{max(over):.4f}); the rule is more than 5 % over the bound in {len(behind)}, "
        f"median {statistics.median(rule):.3f}, worst {max(rule):.2f}"
    )


def table_of(results: Sequence[Result]) -> Table:
    """One line a family: ratios to the bound."""
    table = Table(title="busiest lane / lower bound", title_justify="left")
    columns = (
        "topologies",
        "number",
        "rule median",
        "rule worst",
        "rule > 1.05",
        "ours worst",
        "ours worse",
        "whole worst",
        "cut %",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for name in dict.fromkeys(result.family for result in results):
        some = [result for result in results if result.family == name]
        rule = [result.rule_s / result.bound_s for result in some]
        more = sum(result.reads - result.wanted for result in some)
        table.add_row(
            name,
            str(len(some)),
            f"{statistics.median(rule):.3f}",
            f"{max(rule):.3f}",
            str(sum(ratio > NEAR for ratio in rule)),
            f"{max(result.ours_s / result.bound_s for result in some):.4f}",
            str(sum(result.ours_s > result.rule_s * SAME for result in some)),
            f"{max(result.whole_s / result.bound_s for result in some):.3f}",
            f"{100 * more / sum(result.wanted for result in some):.2f}",
        )
    return table


def main() -> None:
    """All."""
    parser = argparse.ArgumentParser(description="Compare assignments of reads.")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--topologies", type=int, default=200)
    options = parser.parse_args()
    results = [measure(FAMILIES[seed % len(FAMILIES)], seed) for seed in range(options.topologies)]
    scale = measure_scale()
    console = Console(width=160)
    console.print(table_of(results))
    console.print(summary(results), highlight=False, soft_wrap=True)
    console.print(
        f"64 x 8 and 64 x 8 NICs, 5000 pieces: {statistics.median(scale['cpu_s']):.2f} s of one core, {scale['reads']} reads, "
        f"{scale['over_bound']:.5f} of the bound",
        highlight=False,
    )
    if options.out:
        machine = {"cpu": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count()}
        data = {"machine": machine, "results": [asdict(result) for result in results], "scale": scale}
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
