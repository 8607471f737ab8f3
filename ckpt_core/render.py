"""Reports and plans as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ckpt_core.contract import EndpointStatus, EngineInfo
from ckpt_core.cost import Prediction
from ckpt_core.in_flight import InFlight
from ckpt_core.look_report import EngineLook
from ckpt_core.manifest import Manifest
from ckpt_core.metrics import Stage, UpdateReport
from ckpt_core.plan import Plan
from ckpt_core.readiness import VersionRow


def human_bytes(count: float) -> str:
    """Decimal units, as storage and links are rated."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def report_tables(report: UpdateReport) -> list[Table]:
    """Summary with stages, ranks, and hosts where there are several."""
    return [_summary(report), _ranks(report), *([_hosts(report)] if report.hosts else [])]


def _summary(report: UpdateReport) -> Table:
    table = Table(title=f"update {report.update_id}: {report.outcome.value}", show_header=False)
    for name, value in (
        ("version", report.version),
        ("content digest", report.digest),
        ("checkpoint", f"{human_bytes(report.size_bytes)} in {report.tensors} tensors"),
        ("total", f"{report.seconds:.3f} s"),
        ("pause", f"{report.pause_s:.3f} s"),
        *(("in flight", _met(met)) for met in report.in_flight),
        ("transfer", f"{report.transfer_gb_s:.2f} GB/s with a ring of {human_bytes(report.ring_bytes)} per agent"),
        *([("predicted", _predicted(report, report.predicted))] if report.predicted is not None else []),
        ("verified", _verified(report)),
    ):
        table.add_row(name, escape(value))
    table.add_section()
    for stage, seconds in report.stages.items():
        table.add_row(stage, f"{seconds:.3f} s")
    return table


def _verified(report: UpdateReport) -> str:
    return f"{report.verified}; between hosts each bucket by its digest" if report.hosts else report.verified


def _hosts(report: UpdateReport) -> Table:
    table = Table(title="hosts: what went between them")
    table.add_column("host", no_wrap=True)
    for name in ("lacked", "came in", "went out"):
        table.add_column(name, justify="right")
    for host in report.hosts:
        sizes = (host.lacked_bytes, host.network_in_bytes, host.network_out_bytes)
        table.add_row(escape(host.name), *map(human_bytes, sizes))
    return table


def _predicted(report: UpdateReport, predicted: Prediction) -> str:
    took = report.stages.get(Stage.TRANSFER.value, 0.0)
    return (
        f"{predicted.seconds:.3f} s for the transfer ({predicted.bottleneck}; no less than {predicted.lower_bound_s:.3f} s); "
        f"it took {took:.3f} s"
    )


def _met(met: InFlight) -> str:
    if met.requests is None:
        return f"{met.engine}: not told"
    if not met.requests:
        return f"{met.engine}: no request"
    versions = f"old {met.old_version or 'not told'}, new {met.new_version}"
    return f"{met.engine}: {met.requests} requests {met.fate.value} ({versions})"


def _ranks(report: UpdateReport) -> Table:
    table = Table(title="ranks: what they hold, and where their seconds went")
    for name in ("engine", "rank", "fingerprint"):
        table.add_column(name, no_wrap=True)
    for name in ("replayed", "wait", "digest", "load", "finish"):
        table.add_column(name, justify="right")
    urls = list(dict.fromkeys(rank.endpoint for rank in report.ranks))
    for rank in report.ranks:
        stats = rank.stats
        seconds = (stats.wait_s, stats.digest_s, stats.load_s, stats.finish_s)
        table.add_row(
            f"{rank.engine} {urls.index(rank.endpoint)}",
            str(rank.rank),
            rank.fingerprint[:12] or "-",
            f"{stats.replayed_bytes / stats.received_bytes:.0%}" if stats.received_bytes else "-",
            *(f"{value:.3f}" for value in seconds),
        )
    engines = {rank.endpoint: rank.engine for rank in report.ranks}
    table.caption = escape("\n".join(f"{engines[url]} {number}: {url}" for number, url in enumerate(urls)))
    return table


def manifest_tables(manifest: Manifest, *, tensors: bool) -> list[Table]:
    """Summary by dtype, and every tensor if asked."""
    table = Table(title=f"{len(manifest.tensors)} tensors, {human_bytes(manifest.size_bytes)}")
    for name in ("dtype", "tensors", "bytes"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    counts = Counter(meta.dtype for meta in manifest.tensors)
    for dtype, count in counts.most_common():
        size = sum(meta.size_bytes for meta in manifest.tensors if meta.dtype is dtype)
        table.add_row(dtype.value, str(count), human_bytes(size))
    return [table, *([_tensor_table(manifest)] if tensors else [])]


def _tensor_table(manifest: Manifest) -> Table:
    table = Table()
    for name in ("name", "dtype", "shape", "bytes", "digest"):
        table.add_column(name)
    for meta in manifest.tensors:
        table.add_row(
            escape(meta.name), meta.dtype.value, str(list(meta.shape)), human_bytes(meta.size_bytes), meta.digest
        )
    return table


def plan_table(plan: Plan) -> Table:
    """Bytes by agent and by rank."""
    sizes = sorted(step.bucket.size_bytes for step in plan.steps)
    table = Table(title=f"plan {plan.digest}", show_header=False)
    for name, value in (
        ("buckets", f"{len(sizes)}, {human_bytes(sizes[0])} to {human_bytes(sizes[-1])}" if sizes else "0"),
        ("ring", f"{human_bytes(plan.ring_bytes)} per agent"),
        ("sent by agents", ", ".join(human_bytes(count) for count in plan.bytes_by_owner)),
        ("needed by ranks", ", ".join(human_bytes(count) for count in plan.bytes_needed_by_receiver)),
    ):
        table.add_row(name, escape(value))
    return table


def engines_table(infos: list[EngineInfo]) -> Table:
    """Capabilities in rows, engines in columns."""
    table = Table(title="installed engine plugins")
    table.add_column("capability")
    for info in infos:
        table.add_column(f"{info.name} {info.engine_version or '(not installed)'}")
    capabilities = sorted({capability for info in infos for capability in info.capabilities}, key=lambda c: c.value)
    for capability in capabilities:
        supports = [info.support(capability) for info in infos]
        table.add_row(
            capability.value,
            *(
                escape(f"{support.level.value}{': ' + support.detail if support.detail else ''}")
                for support in supports
            ),
        )
    return table


def versions_table(rows: Sequence[VersionRow]) -> Table:
    """The versions of `ckpt versions`."""
    table = Table("label", "digest", "GB", "tensors", "warm", "used", "where", "run by")
    for row in rows:
        gb, warm = f"{row.size_bytes / 1e9:.3f}", "yes" if row.warm else "no"
        cells = (row.label, row.digest, gb, str(row.tensors), warm, row.used_at, row.where, ", ".join(row.engines))
        table.add_row(*map(escape, cells))
    return table


def look_table(look: EngineLook) -> Table:
    """What a look found in one engine."""
    committed = {None: "none written down", True: "those of its commit", False: "not those of its commit"}
    table = Table(title=escape(f"{look.engine} at {look.endpoint}"), show_header=False)
    for name, value in (
        ("compared with", f"{look.version} ({look.digest})"),
        ("result", "equal" if look.equal else "differs" if look.differing_count else "not proved"),
        (
            "compared",
            f"{human_bytes(look.equal_bytes + look.differing_bytes)}, {look.checked_share:.1%} of what it takes",
        ),
        ("differing", _some(look.differing, look.differing_count)),
        ("not comparable", _some(look.unchecked, look.unchecked_count)),
        ("fingerprints", f"{', '.join(text[:12] for text in look.fingerprints)}: {committed[look.as_committed]}"),
        *(("note", note) for note in look.notes),
    ):
        table.add_row(name, escape(value))
    return table


def _some(names: Sequence[str], count: int) -> str:
    rest = f" and {count - len(names[:4])} more" if count > len(names[:4]) else ""
    return f"{count}: {', '.join(names[:4])}{rest}" if count else "none"


def status_table(status: EndpointStatus) -> Table:
    """One endpoint's answer."""
    table = Table(title=status.engine, show_header=False)
    for name, value in (
        ("state", status.state.value),
        ("ranks", f"{status.world_size} on {status.device_kind.value}"),
        ("version", status.version or "not known"),
        ("instance", status.instance_id or "not told"),
        ("detail", status.detail or "-"),
    ):
        table.add_row(name, escape(value))
    return table


def plan_explanation(plan: Plan, manifest: Manifest) -> Table:
    """Every bucket: who sends it, where it lies in the ring, what it waits for, what is in it."""
    table = Table(title="buckets in order")
    for name in ("step", "agent", "seq", "ring offset", "bytes", "after seq", "ranks", "tensors"):
        table.add_column(name, justify="left" if name in ("ranks", "tensors") else "right")
    for step in plan.steps:
        names = [manifest.tensors[piece.tensor].name for piece in step.bucket.pieces]
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(
            str(step.index),
            str(step.owner),
            str(step.seq),
            str(step.ring_offset_bytes),
            human_bytes(step.bucket.size_bytes),
            str(step.free_after_seq),
            ",".join(map(str, step.receivers)),
            escape(f"{names[0]}{rest}") if names else "",
        )
    return table
