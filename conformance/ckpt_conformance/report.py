"""Results of a run, and their forms: text, JSON, Markdown, JUnit XML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any
from xml.etree import ElementTree as ET

from ckpt_conformance.checks.registry import Check
from ckpt_core.capability import Capability
from ckpt_core.contract import EngineInfo


class Status(Enum):
    """KNOWN: fails as declared. STALE: declared as a known failure, but passes; that fails the run."""

    PASSED = "pass"
    FAILED = "FAIL"
    SKIPPED = "skip"
    KNOWN = "known"
    STALE = "STALE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What was found instead of what the rule asks for. `model` is the kind of model it happened on."""

    expected: str
    got: str
    tensor: str = ""
    rank: str = ""
    model: str = ""
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check. `reason` is of a skip or a known failure."""

    check: Check
    status: Status
    seconds: float
    reason: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityRow:
    """A line of the capability table.

    Attributes:
        declared: the level the plugin claims.
        proven: "yes", "no" (a check failed), "partly" (a check was skipped), or "-" (no check ran).
        remark: what qualifies the claim, or why nothing is claimed.
        why_not: where it is claimed and not wholly proven, the checks that failed or were skipped, with their reasons.
    """

    capability: Capability
    declared: str
    proven: str
    remark: str
    why_not: str

    @property
    def comment(self) -> str:
        """The last column: remark, and why not."""
        return "; ".join(text for text in (self.remark, self.why_not) if text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole run."""

    engine: str
    plugin_version: str
    engine_version: str
    results: tuple[Result, ...]
    capabilities: tuple[CapabilityRow, ...]

    @property
    def ok(self) -> bool:
        """No failure, and no stale known failure."""
        return not any(result.status in (Status.FAILED, Status.STALE) for result in self.results)

    @property
    def summary(self) -> str:
        """The last line: "12 passed, 0 failed, 1 skipped", and known failures where there are any."""
        count = Counter(result.status for result in self.results)
        failed = count[Status.FAILED] + count[Status.STALE]
        known = f", {count[Status.KNOWN]} known" if count[Status.KNOWN] else ""
        return f"{count[Status.PASSED]} passed, {failed} failed, {count[Status.SKIPPED]} skipped{known}"


def capability_rows(info: EngineInfo, results: Sequence[Result]) -> tuple[CapabilityRow, ...]:
    """What is declared beside what the checks that need it have shown."""
    rows = []
    for capability in Capability:
        support = info.support(capability)
        of_it = [result for result in results if capability in result.check.needs]
        rows.append(
            CapabilityRow(
                capability=capability,
                declared=support.level.value,
                proven=_proven([result.status for result in of_it]),
                remark=support.detail,
                why_not=_why_not_wholly(of_it) if support.usable else "",
            )
        )
    return tuple(rows)


def why_not(results: Sequence[Result]) -> tuple[str, ...]:
    """Which checks did not pass, with the reasons; checks of one reason together."""
    checks: dict[str, list[str]] = {}
    for result in results:
        if result.status is not Status.PASSED:
            why = result.reason or ("fails" if result.status is Status.FAILED else result.status.value)
            checks.setdefault(why, []).append(result.check.check_id)
    return tuple(f"{', '.join(ids)}: {why}" for why, ids in checks.items())


def result_line(result: Result) -> str:
    """One line of the text report."""
    line = f"{result.status.value:5}  {result.check.check_id}"
    return f"{line}  ({result.reason})" if result.reason else line


def failure_lines(result: Result) -> Iterator[str]:
    """The paragraph of a failure."""
    failure = result.failure
    fields = [("rule", result.check.rule)]
    if failure is not None:
        rows = ("model", "rank", "tensor", "expected", "got")
        fields += [(row, text) for row in rows if (text := str(getattr(failure, row)))]
    fields.append(("usual cause", result.check.usual_cause))
    yield f"{result.check.check_id}{f' ({result.reason})' if result.reason else ''}"
    yield from (f"    {label + ':':13}{text}" for label, text in fields)
    if failure is not None and failure.trace:
        yield from (f"      | {line}" for line in failure.trace.splitlines())


def closing_lines(report: Report) -> Iterator[str]:
    """All that comes after the lines of the checks: failures, capabilities, and the summary last."""
    yield from _failure_paragraphs(report.results)
    yield ""
    yield f"{'capability':18}{'declared':17}{'proven':8}why not, or remark"
    for row in report.capabilities:
        yield f"{row.capability.name:18}{row.declared:17}{row.proven:8}{row.comment}".rstrip()
    yield ""
    yield report.summary


def _failure_paragraphs(results: Sequence[Result]) -> Iterator[str]:
    """An error that stops many checks, as of a hook that is not written, is told once."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        if result.status in (Status.FAILED, Status.STALE, Status.KNOWN):
            error = result.failure.got if result.failure is not None and result.failure.trace else ""
            alike.setdefault(error or result.check.check_id, []).append(result)
    for first, *others in alike.values():
        yield ""
        yield from failure_lines(first)
        if others:
            yield f"    the same error in {', '.join(other.check.check_id for other in others)}"


def to_json(report: Report) -> str:
    """The whole report, for machines."""
    return json.dumps(
        {
            "engine": report.engine,
            "plugin_version": report.plugin_version,
            "engine_version": report.engine_version,
            "ok": report.ok,
            "summary": report.summary,
            "results": [_result_object(result) for result in report.results],
            "capabilities": [
                {
                    "capability": row.capability.value,
                    "declared": row.declared,
                    "proven": row.proven,
                    "remark": row.remark,
                    "why_not": row.why_not,
                }
                for row in report.capabilities
            ],
        },
        indent=2,
    )


def to_markdown(report: Report) -> str:
    """Two tables, for a README. Without versions and times: it must not differ from run to run."""
    lines = ["| check | result | remark |", "|---|---|---|"]
    for result in report.results:
        remark = result.reason or (result.failure.got if result.failure else "")
        lines.append(f"| `{result.check.check_id}` | {result.status.value} | {_cell(remark)} |")
    return "\n".join([*lines, "", *capability_lines(report), "", report.summary, ""])


def capability_lines(report: Report) -> Iterator[str]:
    """The capability table as Markdown."""
    yield "| capability | declared | proven | why not, or remark |"
    yield "|---|---|---|---|"
    for row in report.capabilities:
        yield f"| {row.capability.name} | {row.declared} | {row.proven} | {_cell(row.comment)} |"


def to_junit(report: Report) -> str:
    """One test case a check. A known failure counts as skipped, a stale one as failed."""
    count = Counter(result.status for result in report.results)
    suite = ET.Element(
        "testsuite",
        name=f"ckpt-conformance {report.engine}",
        tests=str(len(report.results)),
        failures=str(count[Status.FAILED] + count[Status.STALE]),
        skipped=str(count[Status.SKIPPED] + count[Status.KNOWN]),
        errors="0",
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    for result in report.results:
        level, _, name = result.check.check_id.partition(".")
        case = ET.SubElement(
            suite, "testcase", classname=f"conformance.{level}", name=name, time=f"{result.seconds:.3f}"
        )
        text = "\n".join(failure_lines(result))
        if result.status in (Status.FAILED, Status.STALE):
            ET.SubElement(case, "failure", message=result.check.rule).text = text
        elif result.status in (Status.SKIPPED, Status.KNOWN):
            ET.SubElement(case, "skipped", message=result.reason)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True)


def _proven(statuses: Sequence[Status]) -> str:
    if any(status in (Status.FAILED, Status.KNOWN) for status in statuses):
        return "no"
    ran = [status for status in statuses if status is not Status.SKIPPED]
    if not ran:
        return "-"
    return "yes" if len(ran) == len(statuses) else "partly"


def _why_not_wholly(results: Sequence[Result]) -> str:
    return "; ".join(why_not(results)) if results else "no check of it ran"


def _result_object(result: Result) -> dict[str, Any]:
    return {
        "check": result.check.check_id,
        "level": result.check.level.name,
        "tier": result.check.tier.value,
        "status": result.status.value.lower(),
        "seconds": round(result.seconds, 3),
        "reason": result.reason,
        "rule": result.check.rule,
        "usual_cause": result.check.usual_cause,
        "failure": asdict(result.failure) if result.failure else None,
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
