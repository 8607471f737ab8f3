"""Commands that look at live engines and change nothing in them: verify, adopt."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_core import render
from ckpt_core.api import Updater
from ckpt_core.cli_options import (
    CheckpointArgument,
    CopyOption,
    EndpointOption,
    EngineOption,
    JsonOption,
    progress_bar,
    show,
    targets_of,
)
from ckpt_core.errors import VerificationError

app = typer.Typer()


@app.command()
def verify(
    endpoint: EndpointOption,
    engine: EngineOption = "",
    version: Annotated[str, typer.Option(help="Label or digest; by default what each engine is known to run.")] = "",
    json: JsonOption = None,
) -> None:
    """Compare the live weights of engines with a version. Ends with 8 where anything differs, or nothing could be compared."""
    with progress_bar() as on_progress, Updater(targets_of(engine, endpoint), on_progress=on_progress) as updater:
        report = updater.verify(version)
    show(json, report.to_json(), map(render.look_table, report.engines))
    if not report.equal:
        raise typer.Exit(VerificationError.exit_code)


@app.command()
def adopt(  # noqa: PLR0917 (options by position are never given)
    checkpoint: CheckpointArgument,
    endpoint: EndpointOption,
    engine: EngineOption = "",
    version: Annotated[str, typer.Option(help="Label; by default the start of the content digest.")] = "",
    copy_to_pool: CopyOption = False,
    json: JsonOption = None,
) -> None:
    """Prove that engines run a checkpoint already and remember it, so that the next update can be undone."""
    with progress_bar() as on_progress, Updater(targets_of(engine, endpoint), on_progress=on_progress) as updater:
        report = updater.adopt(checkpoint, version=version, copy=copy_to_pool)
    show(json, report.to_json(), map(render.look_table, report.engines))
