"""The matrix for people: on a terminal, and as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cases import FAULTS, GROUPS, Case, Group, not_applicable
from rich.console import Console
from rich.table import Table
from trial import Result

_HEAD = """# Fault matrix

Written by `make faults` (`python tests/faults/matrix.py`), from real processes and real signals on the reference engine: two
instances at TP 2, four agents, a plan of {buckets} buckets. Struck are rank 1 of instance 0 (worker), the server of instance
0, agent 1, and the controller, by `kill -9`, by `SIGSTOP` past every deadline (and `SIGCONT` when the controller has ended, or
all ranks gave it up), or by an exception raised at that point (in the controller at a bucket boundary: `SIGINT`).

Every case updates both instances from version A to B. Afterwards all of this is checked:

- every process ended or answered within its deadline;
- what the update's caller was told is true of every engine: bit-equal to a fresh start on A or on B, as told;
- an engine makes tokens only while it is bit-equal to one version, and names that version, also after somebody resumed it;
- two engines that serve hold the same version, unless the report told them apart;
- no agent, socket or shared memory is left;
- the next update, to B, and one back to A commit; nothing that survived was started again for it.

A violation of any of these shows as UNEXPLAINED. {verdict}

| Cell | Meaning |
|---|---|
| CLEAN | nothing was touched, engines hold the old weights |
| RESTORED | the old weights are back |
| POISONED | engines were told to hold mixed weights, and refuse traffic; the next update mended them |
| POISONED+ | the same was told, to be on the safe side: every engine that lives is whole, and serves once it is resumed |
| COMMITTED | engines hold the new weights |
| COMMITTED* | the same, but the call raised an error: an engine could not be flushed or resumed |
| clean, poisoned, committed | the controller was killed and told nobody; so it was. poisoned: an engine refuses traffic |
| clean!, poisoned! | the call raised an error without an outcome: before the pause, or the injected one in the undoing; so it was |
| n.a. | can mean nothing there; the note says why |
"""
_STYLE = {"UNEXPLAINED": "bold red", "CLEAN": "green", "RESTORED": "green", "COMMITTED": "cyan", "POISONED": "yellow"}
Results = Mapping[Case, Result]


class Notes:
    """Footnotes of a table, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        """Of a note with this text."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def rows_of(group: Group, results: Results, notes: Notes) -> Iterator[tuple[str, list[str]]]:
    """Head and cells of each row."""
    for actor in group.actors:
        for fault in FAULTS:
            cases = [Case(group=group.name, actor=actor, fault=fault, point=point) for point in group.points]
            yield f"{actor}, {fault}", [_cell(case, results, notes) for case in cases]


def _cell(case: Case, results: Results, notes: Notes) -> str:
    if why := not_applicable(case):
        return f"n.a. ({notes.number(why)})"
    if case not in results:
        return "not run"
    result = results[case]
    if result.violations:
        return f"UNEXPLAINED ({notes.number('; '.join(result.violations))})"
    return result.cell


def show(results: Results, console: Console) -> None:
    """Print all tables."""
    for group in GROUPS:
        notes, table = Notes(), Table(title=group.title, title_justify="left")
        table.add_column("struck")
        for point in group.points:
            table.add_column(point)
        for head, cells in rows_of(group, results, notes):
            table.add_row(
                head, *(f"[{_STYLE.get(cell.split(' ')[0].upper().rstrip('+*!'), 'dim')}]{cell}[/]" for cell in cells)
            )
        console.print(table)
        for number, text in enumerate(notes.texts, 1):
            console.print(f"({number}) {text}", markup=False)


def page(results: Results, buckets: int) -> str:
    """The page of the documentation."""
    wrong = sum(bool(result.violations) for result in results.values())
    verdict = f"Of {len(results)} cells, {wrong} are unexplained."
    return "\n".join([_HEAD.format(buckets=buckets, verdict=verdict), *(_section(group, results) for group in GROUPS)])


def _section(group: Group, results: Results) -> str:
    notes = Notes()
    lines = [f"## {group.title}", "", group.explains, ""]
    lines += ["| | " + " | ".join(group.points) + " |", "|---" * (len(group.points) + 1) + "|"]
    lines += [f"| {head} | " + " | ".join(cells) + " |" for head, cells in rows_of(group, results, notes)]
    if notes.texts:
        lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1))]
    return "\n".join([*lines, ""])
