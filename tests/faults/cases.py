"""The matrix: who is struck, how, and where; and which cells can mean nothing, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ACTORS = ("agent", "worker", "controller", "server")
FAULTS = ("kill", "stop", "exception")
BUCKETS = 6  # a rank's, by the plan of the tiny model; a case fails where it has another number of them
WHOLE_BUCKETS = 7  # of an update that goes back: what was recorded is forgotten, and loaders get whole tensors
OWN_BUCKETS = 2  # of the agent that is struck
VICTIMS = {"agent": "agent-0-1", "worker": "worker-0-1", "controller": "controller-0-0", "server": "server-0-0"}

STATES = ("IDLE", "PLANNED", "PAUSED", "ATTACHED", "LOADING", "VERIFYING", "COMMITTED", "UNDO", "END")
BOUNDARIES = (*(f"b{number}" for number in range(1, BUCKETS + 1)), "finish")
OF_WORKER = ("hello", "layout", "plan", "begin", "verified", "disarm", "disarmed")
OF_AGENT = ("prepare", "ring", "plan", *(f"b{number}" for number in range(1, OWN_BUCKETS + 1)), "sent")
OF_SERVER = ("pause", "attach", "flush", "resume")

# what lets an update fail first, where the fault is to strike in its undoing: the other instance's loader raises
PRIMARY = "worker-1-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Columns that belong together.

    Attributes:
        title, explains: of its table.
        points: columns.
        actors: rows, each with all faults.
    """

    name: str
    title: str
    explains: str
    points: tuple[str, ...]
    actors: tuple[str, ...] = ACTORS


GROUPS = (
    Group(
        name="state",
        title="As the controller enters each state of the session",
        explains="UNDO: it begins to undo an update that failed because a rank of the other instance raised in its third "
        "bucket. END: it has worked out how that ended (CLEAN, RESTORED or POISONED) and has not resumed anything.",
        points=STATES,
    ),
    Group(
        name="bucket",
        title="At each bucket boundary of a rank, and inside finish",
        explains=f"b1 to b{BUCKETS}: rank 1 of instance 0 has the bytes of its n-th bucket and has not loaded them. finish: "
        "the engine has checked that all tensors came, and has not marked them as whole.",
        points=BOUNDARIES,
    ),
    Group(
        name="worker",
        title="At each step of a rank",
        explains="Before its hello, layout, rings of the plan, begin, and Verified; and in the commit before and after the "
        "guard is disarmed.",
        points=OF_WORKER,
        actors=("worker",),
    ),
    Group(
        name="agent",
        title="At each step of an agent",
        explains=f"Before it prepares, opens its ring, takes the plan, fills its bucket 1 to {OWN_BUCKETS}, and after the "
        "ranks have read its last one.",
        points=OF_AGENT,
        actors=("agent",),
    ),
    Group(
        name="call",
        title="At each control call, on both of its ends",
        explains="The controller before its call (attach: after it), the server as it gets it.",
        points=OF_SERVER,
        actors=("controller", "server"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cell."""

    group: str
    actor: str
    fault: str
    point: str

    @property
    def name(self) -> str:
        """As tests and logs call it."""
        return f"{self.group}-{self.actor}-{self.fault}-{self.point}"

    @property
    def victim(self) -> str:
        """The process that is struck."""
        return VICTIMS[self.actor]

    @property
    def in_undo(self) -> bool:
        """Whether the update is to fail before, by another fault."""
        return self.point in ("UNDO", "END")

    @property
    def ends_engine(self) -> bool:
        """Whether the struck engine must be started again."""
        return self.fault == "kill" and self.actor in ("worker", "server")

    def armed(self) -> dict[str, Any]:
        """What ckpt_faults reads."""
        kind = "raise" if self.fault == "exception" else self.fault
        fault = {"trigger": f"{self._trigger}:{self.point}", "victim": self.victim, "kind": kind, "then": None}
        if not self.in_undo:
            return fault
        return {"trigger": f"{PRIMARY}:b3", "victim": PRIMARY, "kind": "raise", "then": fault}

    @property
    def _trigger(self) -> str:
        """Who reaches the point."""
        return {"state": VICTIMS["controller"], "bucket": VICTIMS["worker"]}.get(self.group, self.victim)


def not_applicable(case: Case) -> str:
    """Why a cell can mean nothing; "" where it can."""
    if case.group == "state" and case.fault == "exception" and case.actor != "controller":
        return (
            "none of its code runs because the controller enters a state: its exceptions are in the tables of its steps"
        )
    if case.group == "bucket" and case.fault == "exception" and case.actor == "agent":
        return "none of its code runs because a rank takes a bucket: its exceptions are in the table of its own steps"
    if case.group == "call" and case.actor == "controller" and case.point == "pause":
        return "the same moment as PLANNED"
    return ""


def all_cells() -> list[Case]:
    """Table by table, row by row."""
    return [
        Case(group=group.name, actor=actor, fault=fault, point=point)
        for group in GROUPS
        for actor in group.actors
        for fault in FAULTS
        for point in group.points
    ]


def in_turn(cases: Sequence[Case]) -> list[Case]:
    """Those that wait for deadlines, those that start engines again, and the others, each spread evenly over all."""
    kinds: dict[tuple[bool, bool], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.fault == "stop", case.ends_engine), []).append(case)
    rank = {case: number / len(kind) for kind in kinds.values() for number, case in enumerate(kind)}
    return sorted(cases, key=rank.__getitem__)


CASES = in_turn([case for case in all_cells() if not not_applicable(case)])
