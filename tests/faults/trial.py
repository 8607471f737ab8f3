"""One case: let the fault strike during an update, and see what came of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize

from cases import BUCKETS, WHOLE_BUCKETS, Case
from stage import PLAN, Found, Stage, World, eventually

ENDS_WITHIN_S = 40.0  # the sum of the deadlines below that one update can meet, and the start of its processes
CLEAN_WITHIN_S = 8.0
SILENCE_S = 2.0
# a death is seen, not waited for: its deadlines are only there in case it is not. A stopped process is told by them alone
PATIENT = {"attach": 15.0, "transfer": 15.0, "commit": 4.0, "pause": 10.0, "prepare": 20.0}
HASTY = {"attach": 2.0, "transfer": 1.5, "commit": 1.0, "pause": 1.5, "prepare": 2.0}
_UNTOUCHED = ("CLEAN", "RESTORED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the update's caller was told. `outcome` is "" where an error told none."""

    outcome: str
    error: str
    by_endpoint: dict[str, str]

    @property
    def committed(self) -> bool:
        """Also where engines could not be resumed afterwards."""
        return self.outcome == "COMMITTED" or "is committed on every rank" in self.error

    def of(self, url: str) -> str:
        """Outcome of one engine."""
        return self.by_endpoint.get(url, "COMMITTED" if self.committed else self.outcome)


@dataclass(slots=True, kw_only=True)
class Result:
    """A filled cell.

    Attributes:
        cell: outcome that was told; in lower case what is true where nobody told; UNEXPLAINED with violations.
        violations: of what must hold.
        report: None where the controller was killed.
        seconds: of the case, with what it took to mend and start again.
    """

    case: Case
    cell: str = ""
    violations: list[str] = field(default_factory=list)
    report: Report | None = None
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0


def run(stage: Stage, case: Case) -> Result:
    """Strike, look, judge, mend."""
    start, result = time.monotonic(), Result(case=case)
    stage.arm(case.armed())
    _update(stage, case, result)
    if not eventually(stage.settled):
        result.violations.append("an engine does not come out of the update")
    result.found = stage.look()
    result.violations += judge(case, result.report, result.found)
    if not eventually(lambda: not stage.remains(), CLEAN_WITHIN_S):
        result.violations.append(f"left behind: {stage.remains()}")
    stage.disarm()
    _mend(stage, result)
    result.cell = "UNEXPLAINED" if result.violations else cell_of(result)
    result.seconds = time.monotonic() - start
    return result


def _update(stage: Stage, case: Case, result: Result) -> None:
    stage.begin(_job(stage, case))
    if case.fault == "stop" and case.actor == "controller":
        _outlast(stage)
    if not stage.ended(ENDS_WITHIN_S):
        result.violations.append(f"the controller did not end within {ENDS_WITHIN_S:g} s")
        os.kill(stage.controller_pid, signal.SIGKILL)
    told = stage.outcome()
    result.report = Report(**told) if told is not None else None
    fired = stage.events("fired")
    if not fired:
        result.violations.append(f"the point was never reached; {stage.errors()} {result.report}")
    elif case.fault == "stop":
        _continue(int(fired[0]["pid"]))
    if {found["count"] for found in stage.events("buckets")} - {BUCKETS, WHOLE_BUCKETS}:
        result.violations.append(
            f"the plan has not {BUCKETS} buckets: give cases.py the number, {stage.events('buckets')}"
        )
    if result.report is None and not (case.fault == "kill" and case.actor == "controller"):
        result.violations.append(f"the controller told nothing: {stage.errors()}")


def _outlast(stage: Stage) -> None:
    """Let a stopped controller go on when every deadline of anybody is over."""
    if not eventually(lambda: bool(stage.events("fired")) or stage.ended(0.0)) or stage.ended(0.0):
        return
    over = time.monotonic() + max(SILENCE_S, *HASTY.values()) + 0.5
    eventually(lambda: time.monotonic() > over and stage.settled())
    _continue(stage.controller_pid)


def _continue(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return  # killed meanwhile by those who gave it up


def _job(stage: Stage, case: Case) -> dict[str, object]:
    deadlines = HASTY if case.fault == "stop" else PATIENT
    config = {f"{name}_timeout_s": seconds for name, seconds in deadlines.items()}
    return {
        "urls": [server.url for server in stage.servers],
        "checkpoint": stage.world.b,
        "version": "B",
        "config": {**PLAN, **config, "silence_timeout_s": SILENCE_S},
        "http_timeout_s": deadlines["pause"],
        "patience_s": deadlines["commit"],
    }


def _mend(stage: Stage, result: Result) -> None:
    """What a case killed is started again, what it did not kill is not; then the next updates must work."""
    try:
        stage.replace_dead()
        stage.mend()
    except Exception as error:  # noqa: BLE001 (whatever it is, the cell is wrong, and the next case needs engines)
        result.violations.append(f"the next update: {type(error).__name__}: {error}")
        stage.start_over()


# -- what must hold ----------------------------------------------------------------------------------------------------
def judge(case: Case, report: Report | None, found: Sequence[Found]) -> list[str]:
    """Everything that must not be so."""
    wrong = [fault for number, one in enumerate(found) for fault in _engine(case, report, number, one)]
    served = {one.holds for one in found if one.serves}
    named = report is not None and len({report.of(one.url) for one in found}) > 1
    if len(served) > 1 and not named:
        wrong.append(f"engines serve different versions: {sorted(served)}")
    return wrong


def _engine(case: Case, report: Report | None, number: int, one: Found) -> list[str]:
    if not one.alive:
        return [] if case.ends_engine and number == 0 else [f"{one.url} died, although nothing was done to it"]
    wrong = []
    if one.state == "dead":
        wrong.append(f"{one.url} calls itself dead, although nothing was killed in it")
    if one.serves and one.holds not in ("A", "B"):
        wrong.append(f"{one.url} serves {one.holds} weights")
    if one.serves and one.version != one.holds:
        wrong.append(f"{one.url} holds {one.holds} and says that it is {one.version!r}")
    if report is not None:
        wrong += _told(case, report, one)
    return wrong


def _told(case: Case, report: Report, one: Found) -> list[str]:
    """Where what was told of an engine is not so."""
    told = report.of(one.url)
    expected = "A" if told in _UNTOUCHED else "B" if told == "COMMITTED" else ""
    if told == "" and not case.in_undo:
        expected = "A"  # an error without an outcome says that nothing was paused
    if not expected:
        return []
    wrong = []
    if one.holds != expected:
        wrong.append(f"{one.url} was told to be {told or 'untouched'}, and holds {one.holds}")
    if not one.serves:
        wrong.append(f"{one.url} was told to be {told or 'untouched'}, and does not serve: {one.state}")
    excused = case.fault == "stop" or report.error.count("/resume") or (told == "COMMITTED" and report.error)
    if one.state != "serving" and not excused:
        wrong.append(f"{one.url} was told to be {told or 'untouched'}, and was left {one.state}")
    return wrong


def cell_of(result: Result) -> str:
    """What the table shows."""
    report = result.report
    if report is not None and report.committed:
        return "COMMITTED" if report.outcome else "COMMITTED*"
    if report is not None and report.outcome:
        whole = report.outcome == "POISONED" and all(one.serves for one in result.found if one.alive)
        return "POISONED+" if whole else report.outcome
    truth = _truth(result.found)
    return f"{truth}!" if report is not None else truth


def _truth(found: Sequence[Found]) -> str:
    held = {one.holds if one.serves else "none" for one in found if one.alive}
    return {"A": "clean", "B": "committed"}.get(held.pop(), "poisoned") if len(held) == 1 else "poisoned"


# -- in processes of a pool ----------------------------------------------------------------------------------------------
_stage: list[Stage] = []


def perform(world: World, case: Case) -> Result:
    """Run a case on this process's stage, which is opened by the first one."""
    if not _stage:
        stage = Stage(world, os.getpid())
        Finalize(None, stage.__exit__, args=(None, None, None), exitpriority=10)
        _stage.append(stage.__enter__())
    return run(_stage[0], case)
