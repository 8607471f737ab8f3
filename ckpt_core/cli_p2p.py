"""Commands of engines that join: serve, export, owners, join."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ckpt_core import render
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
    writable,
)
from ckpt_core.config import Environment
from ckpt_core.directory_client import DirectoryClient
from ckpt_core.errors import ConfigError
from ckpt_core.history import History
from ckpt_core.joining import Joiner
from ckpt_core.owning import Owner
from ckpt_core.p2p.offers import Offer, write_offer
from ckpt_core.p2p.peers import Peers
from ckpt_core.transport.p2p.base import Library

app = typer.Typer()
_LOOK_EVERY_S = 0.5
HostOption = Annotated[str, typer.Option(help="Address of this host, as the others reach it.")]
DirectoryOption = Annotated[str, typer.Option(help="URL of `ckpt serve`.")]


@app.command()
def serve(
    listen: Annotated[str, typer.Option(help="host:port.")] = "127.0.0.1:7780",
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate; with it, https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
) -> None:
    """Run the directory: who offers which version, and what the fleet of this host's controller runs."""
    try:
        from ckpt_core.serving import serve_directory
    except ImportError as error:
        raise ConfigError(f"`ckpt serve` needs more packages ({error}); pip install 'ckpt-core[server]'") from error
    serve_directory(
        listen, tls_cert=tls_cert, tls_key=tls_key, announce=lambda url: OUT.print(f"directory: {url}", soft_wrap=True)
    )


@app.command()
def export(  # noqa: PLR0917 (options by position are never given)
    host: HostOption,
    checkpoint: Annotated[Path | None, typer.Argument(help="Safetensors directory or file.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Offer every version that is warm on this host.")] = False,
    out: Annotated[Path | None, typer.Option(callback=writable, help="JSON file for those who join.")] = None,
    directory: DirectoryOption = "",
    version: Annotated[str, typer.Option(help="Label; by default the start of the content digest.")] = "",
    name: Annotated[str, typer.Option(help="Of this owner; tells several of one host apart.")] = "",
    library: Annotated[Library | None, typer.Option(help="That moves the bytes; by default what is installed.")] = None,
    rdma: Annotated[list[str] | None, typer.Option(help="RDMA device to use. Repeatable.")] = None,
    max_rate: Annotated[float, typer.Option(min=0.0, help="That each joining host may read, GB/s; 0: no limit.")] = 0.0,
    lease_s: Annotated[float, typer.Option(min=0.5, help="Gone when the directory hears nothing so long.")] = 10.0,
) -> None:
    """Let engines that join read versions out of this host's memory, until this command is ended."""
    if (checkpoint is None) != follow:
        raise ConfigError("what is offered? name a checkpoint, or give --follow")
    if not directory and (out is None or follow):
        raise ConfigError("who is told? give --directory URL, or --out FILE for one checkpoint")
    ended = _until_told()
    with Owner(
        host=host,
        name=name or (f"{socket.gethostname()}:{out.name}" if out is not None else ""),
        library=library,
        rdma=rdma or (),
        max_bytes_per_s=max_rate * 1e9,
        directory=directory,
        lease_s=lease_s,
    ) as owner:
        if checkpoint is not None:
            _say(owner.publish(checkpoint, version=version), owner, out)
            _wait(owner, ended)
        else:
            OUT.print(f"warm versions are offered over {owner.library.value}", highlight=False)
            with closing(History.of(Environment.read())) as history:
                _wait(owner, ended, lambda: owner.follow(history))


def _wait(owner: Owner, ended: threading.Event, meanwhile: Callable[[], None] = lambda: None) -> None:
    meanwhile()
    while not ended.wait(_LOOK_EVERY_S) and not owner.replaced:
        meanwhile()


def _say(offer: Offer, owner: Owner, out: Path | None) -> None:
    if out is not None:
        write_offer(offer, out)
    where = str(out) if out is not None else "the directory knows"
    OUT.print(
        f"version {escape(offer.version)} ({offer.digest}) is offered over {owner.library.value}: {escape(where)}",
        soft_wrap=True,
        highlight=False,
    )


def _until_told() -> threading.Event:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended


@app.command()
def owners(directory: DirectoryOption, json: JsonOption = None) -> None:
    """Show who offers which version."""
    with DirectoryClient(directory) as client:
        rows = client.owners()
    table = Table(title="owners")
    for column in ("name", "address", "versions"):
        table.add_column(column)
    for row in rows:
        versions = ", ".join(f"{label} ({digest[:12]})" for digest, label in row.versions.items())
        table.add_row(escape(row.entry.name), escape(row.entry.address), escape(versions))
    show(json, indented(rows), [table])


@app.command()
def join(  # noqa: PLR0917 (options by position are never given)
    endpoint: EndpointOption,
    offers: Annotated[
        list[Path] | None, typer.Option("--from", help="File that `ckpt export` wrote. Repeatable.")
    ] = None,
    directory: DirectoryOption = "",
    version: Annotated[str, typer.Option(help="By default what the fleet runs; with --directory.")] = "",
    engine: EngineOption = "",
    host: HostOption = "127.0.0.1",
    max_rate: Annotated[float, typer.Option(min=0.0, help="What is read in all, GB/s; 0: no limit.")] = 0.0,
    follow: Annotated[bool, typer.Option("--follow", help="And to each version after it, until told to end.")] = False,
    wait_s: Annotated[float, typer.Option(min=0.0, help="For owners, and for an update of the fleet.")] = 600.0,
    json: JsonOption = None,
) -> None:
    """Bring engines to the version that peers have, read out of their memory by one-sided reads."""
    if bool(offers) == bool(directory) or (version and not directory) or (follow and (version or not directory)):
        raise ConfigError(
            "from whom? give --from FILE at least once, or --directory URL with --version or --follow or none"
        )
    targets = targets_of(engine, endpoint)
    with progress_bar() as on_progress:
        if offers:
            peers = Peers(offers=tuple(offers), host=host, max_bytes_per_s=max_rate * 1e9)
            with Updater(targets, on_progress=on_progress) as updater:
                report = updater.update(peers)
        else:
            with (
                DirectoryClient(directory) as client,
                Joiner(
                    targets, client, host=host, max_bytes_per_s=max_rate * 1e9, within_s=wait_s, on_progress=on_progress
                ) as joiner,
            ):
                report = joiner.join(version)
                if follow:
                    joiner.follow(
                        _until_told(), lambda one: OUT.print(f"now at {escape(one.version)}", highlight=False)
                    )
    show(json, report.to_json(), render.report_tables(report))
