"""Commands about versions and what engines run: versions, rollback, recover, ready."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer
from rich.markup import escape

from ckpt_core import plugins, render
from ckpt_core.api import Updater
from ckpt_core.cli_options import (
    OUT,
    EndpointOption,
    EngineOption,
    JsonOption,
    indented,
    progress_bar,
    show,
    targets_of,
)
from ckpt_core.config import Environment
from ckpt_core.contract import EndpointStatus
from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.errors import EngineError, Outcome, UpdateAborted
from ckpt_core.history import History
from ckpt_core.readiness import not_ready, version_rows

app = typer.Typer()


@app.command()
def versions(json: JsonOption = None) -> None:
    """List the versions that are remembered: whether they are warm, where their bytes are, and which engines run them."""
    with contextlib.closing(History.of(Environment.read())) as history:
        found = version_rows(history)
    show(json, indented(found), [render.versions_table(found)])


@app.command()
def rollback(
    endpoint: EndpointOption,
    version: Annotated[str, typer.Argument(help="Label or digest; by default the warm version used last.")] = "",
    engine: EngineOption = "",
    json: JsonOption = None,
) -> None:
    """Move engines back to a version that is still warm."""
    with progress_bar() as on_progress, Updater(targets_of(engine, endpoint), on_progress=on_progress) as updater:
        report = updater.rollback(version)
    show(json, report.to_json(), render.report_tables(report))


@app.command()
def recover(endpoint: EndpointOption, engine: EngineOption = "") -> None:
    """Finish or undo what a controller that died left of engines. Ends with 12 where one of them stays poisoned."""
    with Updater(targets_of(engine, endpoint)) as updater:
        found = updater.recover()
    for url, outcome in found.items():
        OUT.print(f"{escape(url)}: {outcome.value}", highlight=False)
    if not found:
        OUT.print("nothing was left behind")
    if Outcome.POISONED in found.values():
        raise typer.Exit(UpdateAborted("", outcome=Outcome.POISONED).exit_code)


@app.command()
def ready(endpoint: EndpointOption, engine: EngineOption = "", json: JsonOption = None) -> None:
    """Tell whether a router may send requests to engines: exit code 0 if all serve what was last committed to them, else 7."""
    environment = Environment.read()
    options = EndpointOptions.of(environment)
    statuses: dict[str, EndpointStatus] = {}
    for target in targets_of(engine, endpoint):
        handle = Endpoint(url=target.url, engine=target.engine, options=options)
        with contextlib.closing(handle):
            statuses[target.url] = plugins.load(target.engine).hook.ckpt_ready(endpoint=handle)
    known = History.of(environment) if environment.state_root is not None else None
    with contextlib.closing(known) if known else contextlib.nullcontext():
        reasons = not_ready(statuses, {url: known.store.engine(url) for url in statuses} if known else {})
    said = [f"{escape(url)}: {escape(reason)}" for url, reason in reasons.items()]
    show(json, indented(list(statuses.values())), [*map(render.status_table, statuses.values()), *said])
    if reasons:
        raise typer.Exit(EngineError.exit_code)
