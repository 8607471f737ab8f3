"""Commands of engines that join: export, join."""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ckpt_core import render
from ckpt_core.api import Updater
from ckpt_core.cli_options import (
    OUT,
    CheckpointArgument,
    EndpointOption,
    EngineOption,
    JsonOption,
    progress_bar,
    show,
    targets_of,
    writable,
)
from ckpt_core.errors import ConfigError
from ckpt_core.p2p.exporting import exported
from ckpt_core.p2p.offers import write_offer
from ckpt_core.p2p.peers import Peers
from ckpt_core.source import open_checkpoint
from ckpt_core.transport.p2p.base import Library
from ckpt_core.transport.p2p.choice import choose, open_library

app = typer.Typer()
HostOption = Annotated[str, typer.Option(help="Address of this host, as the others reach it.")]


@app.command()
def export(  # noqa: PLR0917 (options by position are never given)
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Option(callback=writable, help="JSON file for those who join.")],
    host: HostOption,
    version: Annotated[str, typer.Option(help="Label; by default the start of the content digest.")] = "",
    library: Annotated[Library | None, typer.Option(help="That moves the bytes; by default what is installed.")] = None,
    rdma: Annotated[list[str] | None, typer.Option(help="RDMA device to use. Repeatable.")] = None,
) -> None:
    """Let engines that join read a checkpoint out of this host's memory, until this command is ended."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    opened = open_library(choose(library), host=host, rdma=rdma or (), serves=True)
    owner = f"{socket.gethostname()}:{out.name}"
    with exported(open_checkpoint(checkpoint), opened, owner=owner, version=version) as offer:
        write_offer(offer, out)
        OUT.print(
            f"version {escape(offer.version)} ({offer.digest}) is offered over {opened.library.value}: {escape(str(out))}",
            soft_wrap=True,
            highlight=False,
        )
        ended.wait()
    opened.close()


@app.command()
def join(  # noqa: PLR0917 (options by position are never given)
    endpoint: EndpointOption,
    offers: Annotated[list[Path], typer.Option("--from", help="File that `ckpt export` wrote. Repeatable.")],
    engine: EngineOption = "",
    host: HostOption = "127.0.0.1",
    max_rate: Annotated[float, typer.Option(min=0.0, help="What is read in all, GB/s; 0: no limit.")] = 0.0,
    json: JsonOption = None,
) -> None:
    """Bring engines to the version that peers have, read out of their memory by one-sided reads."""
    if not offers:
        raise ConfigError("no peers; give --from FILE at least once")
    peers = Peers(offers=tuple(offers), host=host, max_bytes_per_s=max_rate * 1e9)
    with progress_bar() as on_progress, Updater(targets_of(engine, endpoint), on_progress=on_progress) as updater:
        report = updater.update(peers)
    show(json, report.to_json(), render.report_tables(report))
