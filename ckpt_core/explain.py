"""Why a plan is what it is: the alternatives and what bounds them, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from ckpt_core.cost import Alternative, LaneSpeeds, alternatives, routed_alternatives
from ckpt_core.errors import ConfigError
from ckpt_core.limits import Limits
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan
from ckpt_core.render import human_bytes
from ckpt_core.routing.columns import ints
from ckpt_core.routing.needs import WHOLE, ClassNeeds
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.routed import RoutedPlan, make_routed_plan
from ckpt_core.routing.topology import striped, uniform


def lane_speeds(given: Sequence[str], known: Limits | None, *, agents: int, receivers: int) -> tuple[LaneSpeeds, str]:
    """Speeds from what `ckpt limits` kept for this machine, a file that it wrote, and `name=GB/s`; and where from.

    Raises:
        ConfigError: a file that is not that, or a name that is no lane.
    """
    source = "limits measured on this machine" if known else "assumed: a host with H200s and NICs of 400 Gbit/s"
    files = [text for text in given if "=" not in text]
    if files:
        known, source = _read(Path(files[-1])), files[-1]
    speeds = LaneSpeeds.of_limits(known, agents=agents, receivers=receivers) if known else LaneSpeeds()
    changes = [text for text in given if "=" in text]
    return speeds.changed(changes), ", ".join([source, *changes])


def _read(path: Path) -> Limits:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Limits)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected what `ckpt limits --json` writes, got {error}; measure again") from error


def one_host_table(plan: Plan, speeds: LaneSpeeds, source: str) -> Table:
    """The ways to do what a plan of one host does."""
    return alternatives_table(alternatives(plan, speeds), source)


def many_hosts_tables(manifest: Manifest, *, ranks: int, hosts: int, speeds: LaneSpeeds, source: str) -> list[Table]:
    """The ways to bring all ranks on so many hosts every tensor, and the lanes of the routed one.

    The checkpoint is taken to lie in stripes in the pools of all hosts.

    Raises:
        ConfigError: more hosts than ranks.
    """
    if hosts > ranks:
        raise ConfigError(
            f"{ranks} ranks on {hosts} hosts: expected at least one rank on each host; give fewer --hosts"
        )
    each = -(-ranks // hosts)
    used = -(-ranks // each)
    topology = uniform(
        ranks=ranks,
        ranks_per_host=each,
        classes=1,
        holder_sets=[(host,) for host in range(used)],
        holder_of=striped(manifest, natural_order(manifest), used),
        nics=speeds.nics,
        nic_gb_s=speeds.nic_gb_s,
        pcie_gb_s=speeds.pcie_gb_s,
    )
    everything = ClassNeeds(
        tensors=ints(list(range(len(manifest.tensors)))), parts=ints([WHOLE] * len(manifest.tensors)), boxes=()
    )
    plan = make_routed_plan(manifest, [everything], topology)
    ways = routed_alternatives(plan, manifest.size_bytes, speeds)
    return [alternatives_table(ways, source), lanes_table(plan)]


def alternatives_table(ways: Sequence[Alternative], source: str) -> Table:
    """Ways to move the update, the fastest first."""
    table = Table(title="ways to move it, the fastest first", title_justify="left", caption=escape(f"lanes: {source}"))
    table.add_column("way", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("bound s", justify="right", no_wrap=True)
    table.add_column("bottleneck; bytes; why")
    for way in ways:
        sizes = ", ".join(f"{lane} {human_bytes(size)}" for lane, size in way.bytes_by_lane.items())
        seconds = "-" if way.seconds is None else f"{way.seconds:.4f}"
        told = f"{way.bottleneck}; {sizes}; {way.why}"
        table.add_row(way.road.value, seconds, f"{way.lower_bound_s:.4f}", escape(told))
    return table


def lanes_table(plan: RoutedPlan) -> Table:
    """Busiest lane of each kind, against what no plan can beat."""
    table = Table(title=f"lanes of the routed plan, {plan.buckets} buckets", title_justify="left")
    for name in ("lane", "busiest s", "lower bound s", "ratio"):
        table.add_column(name, justify="left" if name == "lane" else "right")
    busiest = plan.busiest_s()
    for kind, bound in plan.demand.lower_bound_s.items():
        ratio = f"{busiest[kind] / bound:.4f}" if bound else "-"
        table.add_row(kind.value, f"{busiest[kind]:.4f}", f"{bound:.4f}", ratio)
    return table
