"""The command line.

Exit codes: 0 done · 1 unexpected error · 2 wrong option · 3 unusable checkpoint · 4 no plan · 5 plugin · 6 transport ·
7 engine · 8 verification · 10 aborted, nothing touched · 11 aborted, old weights restored · 12 aborted, engines poisoned.
`ckpt ready` ends with 0 where a router may send requests, else with 7.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ckpt_core import api, cli_looks, cli_new_engine, cli_p2p, cli_versions, plugins, render
from ckpt_core import cluster as clusters
from ckpt_core import explain as explanation
from ckpt_core import limits as machine_limits
from ckpt_core.cli_options import (
    ERR,
    OUT,
    CheckpointArgument,
    CopyOption,
    EndpointOption,
    EngineOption,
    JsonOption,
    indented,
    progress_bar,
    show,
    targets_of,
    writable,
)
from ckpt_core.config import MIB, Environment, Reading, Undo, UpdateConfig, VerifyLevel
from ckpt_core.contract import PauseMode
from ckpt_core.cpu import CpuDevice
from ckpt_core.cuda import probe
from ckpt_core.device import CPU
from ckpt_core.devices import visible_gpus
from ckpt_core.errors import CkptError, ConfigError, UpdateAborted
from ckpt_core.host_service import HostService
from ckpt_core.layout import whole_layout
from ckpt_core.manifest import Manifest
from ckpt_core.metrics import Stage
from ckpt_core.plan import Plan, make_plan
from ckpt_core.source import open_checkpoint
from ckpt_core.staging import HostPool
from ckpt_core.timeline import draw
from ckpt_core.trace import write_chrome_trace

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def update(
    checkpoint: CheckpointArgument,
    endpoint: EndpointOption,
    engine: EngineOption = "",
    version: Annotated[str, typer.Option(help="Label; by default the start of the content digest.")] = "",
    pause_mode: Annotated[PauseMode, typer.Option(help="What happens to requests in flight.")] = PauseMode.WAIT,
    allow_stale_cache: Annotated[bool, typer.Option("--allow-stale-cache")] = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing")] = False,
    allow_unexpected: Annotated[bool, typer.Option("--allow-unexpected")] = False,
    verify: Annotated[VerifyLevel, typer.Option(help="How the update proves itself.")] = VerifyLevel.AUTO,
    fingerprint: Annotated[bool, typer.Option(help="Digest the live weights of every rank.")] = True,
    undo: Annotated[Undo, typer.Option(help="How mixed weights become the old ones again if it fails.")] = Undo.REPLAY,
    keep_versions: Annotated[int, typer.Option(min=1, help="Versions that stay warm to go back to.")] = 2,
    copy_to_pool: CopyOption = False,
    pool_mib: Annotated[int, typer.Option(min=0, help="Limit of versions in the host pool, MiB; 0: none.")] = 0,
    replay: Annotated[bool, typer.Option(help="Copy recorded slices instead of calling the engine's loader.")] = True,
    ring_mib: Annotated[int, typer.Option(min=0, help="Ring of each agent, MiB; 0: 16 on CPU, 128 on a GPU.")] = 0,
    bucket_mib: Annotated[int, typer.Option(min=0, help="What travels together, MiB; 0: a quarter of the ring.")] = 0,
    cluster: Annotated[Path | None, typer.Option(help="controller.json, where engines are on other hosts.")] = None,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts of the cluster that take part.")] = 1,
    reading: Annotated[Reading, typer.Option(help="Which hosts of the cluster read the checkpoint.")] = Reading.HERE,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Deadline of the transfer, seconds.")] = 600.0,
    pause_timeout_s: Annotated[float, typer.Option(min=0.1, help="Deadline of the pause, seconds.")] = 120.0,
    json: JsonOption = None,
    trace: Annotated[
        Path | None, typer.Option(callback=writable, help="Write a Chrome/Perfetto trace here; see `ckpt timeline`.")
    ] = None,
    metrics_file: Annotated[Path | None, typer.Option(callback=writable, help="Write Prometheus text here.")] = None,
) -> None:
    """Put the weights of a checkpoint into running engines, in place."""
    config = UpdateConfig(
        ring_bytes=ring_mib * MIB,
        bucket_bytes=bucket_mib * MIB,
        pause_mode=pause_mode,
        allow_stale_cache=allow_stale_cache,
        verify=verify,
        fingerprint=fingerprint,
        replay=replay,
        undo=undo,
        keep_versions=keep_versions,
        copy_to_pool=copy_to_pool,
        pool_bytes=pool_mib * MIB,
        trace=trace is not None,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        transfer_timeout_s=timeout_s,
        pause_timeout_s=pause_timeout_s,
    )
    members = None if cluster is None else api.Cluster.load(cluster, hosts=hosts, reading=reading)
    with progress_bar() as on_progress:
        report = api.update(
            checkpoint,
            targets_of(engine, endpoint),
            version=version,
            config=config,
            on_progress=on_progress,
            cluster=members,
        )
    if trace is not None:
        known = machine_limits.load(Environment.read().cache_root, machine_limits.identify())
        write_chrome_trace(
            report.tracks, trace, known.by_stage(rank.device for rank in report.ranks) if known else None
        )
    if metrics_file is not None:
        report.write_metrics(metrics_file)
    show(json, report.to_json(), render.report_tables(report))


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    digest: Annotated[bool, typer.Option(help="Read all bytes and compute the content digest.")] = True,
    json: JsonOption = None,
) -> None:
    """Show tensors, bytes, dtypes and digest of a checkpoint."""
    index = open_checkpoint(checkpoint)
    manifest = Manifest.from_index(index)
    if digest:
        pool = HostPool(CpuDevice())
        pool.adopt(index)
        with progress_bar() as on_progress:
            found, done = {}, 0
            for extent in index.extents:
                found[extent.name] = pool.digest(extent.name)
                done += extent.size_bytes
                on_progress(Stage.PREPARE, done, index.size_bytes)
        pool.close()
        manifest = manifest.with_digests(found)
    digests = [f"structure digest {manifest.structure_digest}"]
    digests += [f"content digest   {manifest.digest}"] if digest else []
    show(json, manifest.to_json(), [*render.manifest_tables(manifest, tensors=tensors), *digests])


@app.command()
def plan(
    checkpoint: CheckpointArgument,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks that receive.")],
    agents: Annotated[int, typer.Option(min=0, help="Number of agents; 0 for one per rank.")] = 0,
    ring_mib: Annotated[int, typer.Option(min=1, help="Ring of each agent, MiB.")] = 16,
    bucket_mib: Annotated[int, typer.Option(min=1, help="Bytes that travel together, MiB.")] = 4,
    explain: Annotated[bool, typer.Option("--explain", help="List every bucket, and the ways to move them.")] = False,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts that the ranks are on, for --explain.")] = 1,
    lanes: Annotated[
        list[str] | None,
        typer.Option(help="For --explain: what `ckpt limits --json` wrote, or pcie=, peer=, nic= GB/s. Repeatable."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Plan an update in which every rank takes every tensor, without touching an engine."""
    manifest = Manifest.from_index(open_checkpoint(checkpoint))
    made = make_plan(
        manifest,
        [whole_layout(manifest)] * ranks,
        agents=agents or ranks,
        ring_bytes=ring_mib * MIB,
        bucket_bytes=min(bucket_mib, ring_mib) * MIB,
    )
    ways = _explained(made, manifest, hosts, lanes or []) if explain else []
    explained = [render.plan_explanation(made, manifest)] if explain else []
    show(json, indented(made), [render.plan_table(made), *explained, *ways])


def _explained(made: Plan, manifest: Manifest, hosts: int, lanes: list[str]) -> list[Table]:
    known = machine_limits.load(Environment.read().cache_root, machine_limits.identify())
    speeds, source = explanation.lane_speeds(lanes, known, agents=made.agents, receivers=made.receivers)
    if hosts == 1:
        return [explanation.one_host_table(made, speeds, source)]
    return explanation.many_hosts_tables(manifest, ranks=made.receivers, hosts=hosts, speeds=speeds, source=source)


@app.command()
def cluster(
    directory: Annotated[Path, typer.Argument(help="Where the two files are written.")],
    address: Annotated[str, typer.Option(help="Where whoever updates listens: tcp://host:port.")],
) -> None:
    """Make the keys of a cluster: controller.json for who updates, agent.json for the hosts of engines."""
    for path in clusters.create(directory, address):
        OUT.print(escape(str(path)), soft_wrap=True)


@app.command()
def agent(
    cluster: Annotated[Path, typer.Option(help="agent.json of the cluster.")],
    address: Annotated[str, typer.Option(help="Address of this host, as the other hosts reach it.")],
    count: Annotated[int, typer.Option(min=0, help="Agents; 0: one for each GPU, or one where there is none.")] = 0,
    nic_gb_s: Annotated[float, typer.Option(min=0.0, help="What its network carries, GB/s, for predictions.")] = 0.0,
) -> None:
    """Run the agents of this host, for updates of engines on several hosts, until it is told to stop."""
    environment = Environment.read()
    gpus = visible_gpus()
    service = HostService(
        clusters.load(cluster, controller=False),
        reached_at=address,
        devices=(gpus[:count] if count else gpus) or (CPU,) * max(count, 1),
        memory_root=environment.memory_root,
        nic_gb_s=nic_gb_s,
        log_level=environment.log_level,
    )
    with service:
        service.serve()


@app.command()
def limits(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure in.")] = 4.0, json: JsonOption = None
) -> None:
    """Measure what this machine's memory, buses and GPUs allow, and keep it for reports and plans."""
    with probe.open_gpus() as gpus:
        found = machine_limits.measure(machine_limits.identify(), gpus, seconds)
    machine_limits.save(Environment.read().cache_root, found)
    show(json, machine_limits.to_json(found), [machine_limits.limits_table(found)])


@app.command()
def timeline(
    trace: Annotated[Path, typer.Argument(help="Trace that `ckpt update --trace` wrote.")],
    out: Annotated[Path | None, typer.Option(callback=writable, help="Page to write; by default beside it.")] = None,
) -> None:
    """Draw a trace as one self-contained HTML page."""
    page = out or trace.with_suffix(".html")
    draw(trace, page)
    OUT.print(escape(str(page)), soft_wrap=True)


@app.command()
def engines(json: JsonOption = None) -> None:
    """Show installed engine plugins and what they can do."""
    infos = [plugins.load(name).info for name in plugins.names()]
    show(json, indented(infos), [render.engines_table(infos)])


@app.command()
def demo(
    cache: Annotated[Path, typer.Option(help="Where the model is kept between runs.")] = Path(".cache"),
    generated: Annotated[bool, typer.Option("--generated", help="Use a generated model, fetch nothing.")] = False,
) -> None:
    """Update two running engines with a real small model, to a second version, and back."""
    _extension("demo")(cache, generated=generated, console=OUT)


app.add_typer(cli_versions.app)
app.add_typer(cli_looks.app)
app.add_typer(cli_p2p.app)
app.add_typer(cli_new_engine.app)


def main() -> None:
    """Entry point: typed errors become one message and their exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(standalone_mode=True)
    except UpdateAborted as error:
        ERR.print(f"[bold red]aborted, {error.outcome.value}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        for url, outcome in error.by_endpoint.items():
            ERR.print(f"  {escape(url)}: {outcome.value}", highlight=False)
        sys.exit(error.exit_code)
    except CkptError as error:
        ERR.print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def _extension(name: str) -> Callable[..., None]:
    """A command that another package brings: the core knows no engine."""
    try:
        found: Callable[..., None] = entry_points(group="ckpt_core.commands")[name].load()
    except (KeyError, ImportError) as error:
        raise ConfigError(
            f"`ckpt {name}` needs more packages ({error}); pip install 'ckpt-core[conformance,demo]'"
        ) from error
    return found
