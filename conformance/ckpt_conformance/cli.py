"""`ckpt-conformance`: does an engine's plugin keep the contract?"""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ckpt_conformance import report as forms
from ckpt_conformance.checks.registry import Check
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.report import Report
from ckpt_conformance.runner import Runner, find_harness, select
from ckpt_conformance.table_file import TableFile
from ckpt_core.errors import CkptError, ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class LevelName(str, Enum):
    """Levels as the command line spells them."""

    CORE = "CORE"
    VERIFIED = "VERIFIED"
    TRANSACTIONAL = "TRANSACTIONAL"
    SHARDED = "SHARDED"


@app.command()
def conformance(  # noqa: PLR0917 typer makes options of them, never positions
    engine: Annotated[str, typer.Option(help="Engine whose installed harness is used.")] = "reference",
    level: Annotated[
        LevelName, typer.Option(help="Checks up to this level.", case_sensitive=False)
    ] = LevelName.SHARDED,
    tier: Annotated[list[Tier] | None, typer.Option(help="Only this tier; may be given several times.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Only this check; may be given several times.")] = None,
    harness: Annotated[str, typer.Option(help="Harness to use, as module:object.")] = "",
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the results as JUnit XML.")] = None,
    write_table: Annotated[
        Path | None, typer.Option(help="Put the capability table between its markers there.")
    ] = None,
    check_table: Annotated[
        Path | None, typer.Option(help="Fail if the table between its markers there differs.")
    ] = None,
    try_all: Annotated[bool, typer.Option("--try", help="Run checks of unclaimed capabilities, too.")] = False,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks and their rules.")] = False,
    mutants: Annotated[bool, typer.Option("--mutants", help="Show that each broken engine is caught.")] = False,
) -> None:
    """Run the conformance checks on an engine's plugin.

    Exit code: 0 all passed or skipped or known; 1 a failure, a known failure that passes, or another table; 2 and more: not run.
    """
    torch.set_num_threads(1)  # tiny tensors: more threads only get in each other's way
    if mutants:
        raise typer.Exit(0 if _run_mutants() else 1)
    checks = select(Level[level.value], tier or (), check or ())
    if list_checks:
        _list(checks)
        return
    if (write_table or check_table) and (tier or check or try_all):
        raise ConfigError("a table is of the whole suite: leave out --tier, --check and --try")
    found = find_harness(engine, harness)
    written, checked = (
        TableFile(path, found.engine, Level[level.value]) if path else None for path in (write_table, check_table)
    )
    report = Runner(found, try_all=try_all, on_result=lambda result: typer.echo(forms.result_line(result))).run(checks)
    for path, form in ((json, forms.to_json), (markdown, forms.to_markdown), (junit, forms.to_junit)):
        if path is not None:
            path.write_text(form(report), encoding="utf-8")
    for line in forms.closing_lines(report):
        typer.echo(line)
    if written:
        written.write(report)
    if not (_same_table(checked, report) and report.ok):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the script."""
    try:
        app()
    except CkptError as error:
        typer.echo(f"ckpt-conformance: {error}", err=True)
        raise SystemExit(max(2, error.exit_code)) from None


def _list(checks: list[Check]) -> None:
    for check in checks:
        needs = ", ".join(sorted(capability.name for capability in check.needs))
        typer.echo(f"{check.check_id}  [{check.tier.value}{f'; needs {needs}' if needs else ''}]\n    {check.rule}")
    typer.echo(f"{len(checks)} checks")


def _same_table(file: TableFile | None, report: Report) -> bool:
    difference = file.difference(report) if file else ""
    if difference:
        typer.echo(f"{difference}\nthe table is not that of this run; write it anew with --write-table", err=True)
    return not difference


def _run_mutants() -> bool:
    from ckpt_conformance.mutants.catalogue import judged

    caught, missed, start = 0, 0, time.monotonic()
    for mutant, verdict in judged():
        caught, missed = caught + verdict.ok, missed + (not verdict.ok)
        word = "caught" if verdict.ok else "MISSED"
        typer.echo(f"{word:7} {mutant.name}: {verdict.text}  ({verdict.seconds:.1f} s)")
    typer.echo(f"{caught} caught, {missed} missed, in {(time.monotonic() - start) / 60:.1f} min")
    return not missed


if __name__ == "__main__":
    main()
