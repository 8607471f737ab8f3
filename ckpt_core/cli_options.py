"""What commands share: arguments, options, tables and progress on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from ckpt_core.errors import ConfigError
from ckpt_core.metrics import Stage
from ckpt_core.targets import Target

OUT = Console()
ERR = Console(stderr=True)

CheckpointArgument = Annotated[Path, typer.Argument(help="Safetensors directory or file.")]
EngineOption = Annotated[str, typer.Option("--engine", help="Name of the engine's plugin; see `ckpt engines`.")]
EndpointOption = Annotated[
    list[str],
    typer.Option("--endpoint", help="URL of an engine's server, or NAME=URL for another engine. Repeatable."),
]


def writable(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work and not after it."""
    if path is None or str(path) == "-":
        return path
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written; name a file in a directory that exists and is yours")
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Write the result as JSON to this file; - for stdout."),
]


def targets_of(engine: str, endpoints: list[str]) -> list[Target]:
    """Engines by URL, or by NAME=URL."""
    return [_target(engine, text) for text in endpoints]


def _target(engine: str, text: str) -> Target:
    name, equals, url = text.partition("=")
    if not equals or "/" in name:
        name, url = engine, text
    if not name:
        raise ConfigError(f"which engine is {text}? give --engine NAME, or --endpoint NAME=URL")
    return Target(engine=name, url=url.rstrip("/"))


def indented(value: Any) -> bytes:
    """JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


CopyOption = Annotated[
    bool, typer.Option("--copy-to-pool", help="Copy the files into the host pool, so that they may go.")
]


def show(json: Path | None, data: bytes, tables: Iterable[RenderableType]) -> None:
    """A command's result: tables for people, unless JSON goes to standard output (-); JSON to a file, there, or nowhere."""
    if json is None or str(json) != "-":
        for table in tables:
            OUT.print(table, highlight=False, soft_wrap=isinstance(table, str))
    _write_json(json, data)


def _write_json(path: Path | None, data: bytes) -> None:
    if path is None:
        return
    if str(path) == "-":
        sys.stdout.buffer.write(data)
    else:
        path.write_bytes(data)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Stage, int, int], None]]:
    """A bar on standard error, one per stage; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        tasks: dict[Stage, TaskID] = {}

        def note(stage: Stage, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage.value, total=total)
            progress.update(tasks[stage], completed=done)

        yield note
