"""Updates of several hosts by broadcast, over bucket sizes and ways to cut batches, against the limit of the bus.

    torchrun --nproc-per-node 2 benchmarks/collective.py --out results.json                 two GPUs act as two hosts
    torchrun --nproc-per-node 2 benchmarks/collective.py --backend gloo --size-mib 64 --out results.json         on CPU

Each process is one host's agent with one lane, and starts one rank as a process of its own, which copies what arrives into its
weights. Every byte leaves the memory of one host and arrives at the ranks of all: the limit is what all agents together
can copy to their devices, measured in the same run. Times are from the first start to the last end of all processes, by the
clock that they share. Bits are checked after each case.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
from collective_rank import DEADLINE_S, MIB, SEED, Case, Order, Setting, make_shapes, plan_of, poller
from generated import write_checkpoint
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ckpt_core.cuda import driver
from ckpt_core.device import Device
from ckpt_core.devices import device_of
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing, send
from ckpt_core.plan import Plan
from ckpt_core.source import open_checkpoint
from ckpt_core.staging import HostPool
from ckpt_core.transport.collective import CollectiveRingWriter, Schedule
from ckpt_core.transport.groups import CollectiveGroup
from ckpt_core.transport.peers import Membership

RANK = Path(__file__).with_name("collective_rank.py")
VARIANTS = ("batched", "alone", "grouped", "eager")


class Control:
    """What the agents tell each other beside the updates, through torchrun's store."""

    def __init__(self, host: int, hosts: int) -> None:
        self.host, self.hosts = host, hosts
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(*self.address, is_master=False, timeout=timedelta(seconds=300))
        self._count = 0

    def gather(self, mine: Any) -> list[Any]:
        """What all said; also a barrier."""
        self._count += 1
        self._store.set(f"benchmark/{self._count}/{self.host}", json.dumps(mine))
        return [json.loads(self._store.get(f"benchmark/{self._count}/{host}")) for host in range(self.hosts)]

    def timed(self, call: Callable[[], None]) -> float:
        """Seconds from the first start to the last end of all agents."""
        self.gather(None)
        start = time.monotonic()
        call()
        spans = self.gather([start, time.monotonic()])
        return float(max(end for _, end in spans) - min(begin for begin, _ in spans))


class Agent:
    """One host: its pool, its place in the lane, and its rank."""

    def __init__(self, setting: Setting, control: Control, backend: str, directory: Path) -> None:
        self._control, self._directory = control, directory
        self._prepared: tuple[tuple[Case, str], tuple[Plan, Schedule, Outgoing]] | None = None
        index = open_checkpoint(setting.checkpoint)
        self.manifest = Manifest.from_index(index)
        command = [sys.executable, str(RANK), json.dumps(asdict(setting))]
        self._rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._device: Device = device_of(setting.device)
        self._pool = HostPool(self._device, turn=control.host / control.hosts)
        self.locked_bytes, self.lock_s = self._pool.adopt(index)
        start = time.monotonic()
        self._group = CollectiveGroup.join(
            Membership(lane="0", host=control.host, hosts=control.hosts, address="127.0.0.1"),
            backend=backend,
            device=setting.torch_device,
            store=control.address,
            timeout_s=DEADLINE_S,
        )
        self.join_s = time.monotonic() - start

    def limit_gb_s(self) -> float:
        """What all agents at once copy from their pools into rings."""
        buffer = self._device.allocate(64 * MIB, self._directory, "limit")
        source = self._pool.parts(
            self.manifest, plan_of(Case(bucket_mib=16, ring_mib=16), self.manifest).steps[0].bucket
        )
        size = sum(part.size for _, part in source)
        repeats = max(1, (1 << 32 if self._device.name != "cpu" else 1 << 28) // size)

        def copy() -> None:
            for number in range(repeats):
                for offset, part in source:
                    buffer.write(number % 4 * 16 * MIB + offset, part)
            mark = buffer.mark()
            poller().until(mark.reached, "copies")

        seconds = [self._control.timed(copy) for _ in range(4)]
        buffer.close()
        return self._control.hosts * repeats * size / 1e9 / min(seconds)

    def schedule(self, plan: Plan, variant: str) -> Schedule:
        """How a variant cuts: see `VARIANTS`. "alone" is a broadcast a bucket, "grouped" has sources that change with each."""
        hosts = self._control.hosts
        sources = (lambda step: step.seq % hosts) if variant in {"alone", "grouped"} else None
        batch_bytes = 1 if variant == "alone" else None
        return Schedule.of(
            plan.steps, hosts=hosts, ring_bytes=plan.ring_bytes, sources=sources, batch_bytes=batch_bytes
        )

    def update(self, case: Case, variant: str) -> float:
        """Seconds of one update."""
        plan, schedule, outgoing = self._prepare(case, variant)
        writer = CollectiveRingWriter(
            owner=0,
            receivers=1,
            ring_bytes=plan.ring_bytes,
            device=self._device,
            directory=self._directory,
            group=self._group,
            schedule=schedule,
            timeout_s=DEADLINE_S / 2,
            wait_for_peers=variant != "eager",
        )
        try:
            self._tell(Order(case=case, offer=writer.offer()))
            self._expect("ready")
            seconds = self._control.timed(lambda: void(send(outgoing, writer=writer, poller=poller())))
            self._expect("done")
        finally:
            writer.close()
        return seconds

    def _prepare(self, case: Case, variant: str) -> tuple[Plan, Schedule, Outgoing]:
        """What stays the same over the updates of a case."""
        if self._prepared is None or self._prepared[0] != (case, variant):
            plan = plan_of(case, self.manifest)
            schedule = self.schedule(plan, variant)
            is_source = functools.partial(schedule.is_from, self._control.host)
            outgoing = Outgoing(plan, 0, self._pool, self.manifest, is_source=is_source)
            self._prepared = (case, variant), (plan, schedule, outgoing)
        return self._prepared[1]

    def wrong(self, case: Case) -> int:
        """Wrong tensors of all ranks."""
        self._tell(Order(case=case))
        return sum(self._control.gather(int(self._answer())))

    def close(self) -> None:
        """End the rank and leave."""
        assert self._rank.stdin is not None
        self._rank.stdin.close()
        self._rank.wait(DEADLINE_S)
        self._group.close()
        self._pool.close()

    def _tell(self, order: Order) -> None:
        assert self._rank.stdin is not None
        self._rank.stdin.write(msgspec.json.encode(order).decode() + "\n")
        self._rank.stdin.flush()

    def _answer(self) -> str:
        assert self._rank.stdout is not None
        return self._rank.stdout.readline().strip()

    def _expect(self, word: str) -> None:
        if (got := self._answer()) != word:
            sys.exit(f"the rank of host {self._control.host} said {got!r}, expected {word!r}; see its error above")


def void(_: object) -> None:
    """Drop a result."""


def measure(agent: Agent, cases: list[Case], variants: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """One row a case and variant: seconds of each update, the first apart."""
    for case in cases:
        for variant in variants:
            first, *steady = [agent.update(case, variant) for _ in range(repeats + 1)]
            plan = plan_of(case, agent.manifest)
            batches = agent.schedule(plan, variant).batches
            yield {
                "case": case.name,
                "ring_mib": plan.ring_bytes / MIB,
                "variant": variant,
                "buckets": len(plan.steps),
                "batches": len(batches),
                "broadcasts": sum(len(batch.regions) for batch in batches),
                "gb": plan.size_bytes / 1e9,
                "first_s": first,
                "steady_s": steady,
                "wrong": agent.wrong(case),
            }


def print_results(rows: list[dict[str, Any]], limit: float, console: Console) -> None:
    """One table, one line a case, median GB/s of every variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    table = Table(title=f"median GB/s by variant; limit of all hosts' buses: {limit:.1f} GB/s")
    for name in (
        "case",
        "ring",
        "buckets",
        *(f"{v} (launches)" for v in variants),
        "% limit",
        "min-max s",
        "first s",
        "wrong",
    ):
        table.add_column(name, justify="left" if name == "case" else "right")
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        rates = [row["gb"] / statistics.median(row["steady_s"]) for row in mine]
        table.add_row(
            case,
            f"{mine[0]['ring_mib']:.0f}",
            str(mine[0]["buckets"]),
            *(f"{rate:.1f} ({row['batches']})" for rate, row in zip(rates, mine, strict=True)),
            f"{100 * rates[0] / limit:.1f}",
            f"{min(mine[0]['steady_s']):.4f}-{max(mine[0]['steady_s']):.4f}",
            f"{mine[0]['first_s']:.3f}",
            str(sum(row["wrong"] for row in mine)),
        )
    console.print(table)


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--bucket", type=float, action="append", help="MiB per bucket; repeatable")
    parser.add_argument("--ring", type=float, default=128, help="MiB of ring per agent")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="repeatable; the first is rated against the limit"
    )
    parser.add_argument("--size-mib", type=int, default=4096, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where the checkpoint is generated")  # noqa: S108
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Run all cases on this host; host 0 prints."""
    options = parse()
    control = Control(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    index = int(os.environ["LOCAL_RANK"])
    checkpoint = options.directory / f"ckpt-benchmark-{control.address[1]}.safetensors"
    if control.host == 0:
        write_checkpoint(checkpoint, make_shapes(options.size_mib), SEED)
    control.gather(None)
    on_gpu = options.backend == "nccl"
    setting = Setting(
        checkpoint=str(checkpoint),
        size_mib=options.size_mib,
        device=driver.device_uuid(index) if on_gpu else "cpu",
        index=index if on_gpu else 0,
    )
    cases = [Case(bucket_mib=mib, ring_mib=options.ring) for mib in options.bucket or (1, 2, 4, 8, 16, 32, 64)]
    cases += [Case(bucket_mib=mib, ring_mib=options.ring, even=False) for mib in (0.25, 1, 8)]
    console = Console(width=160, quiet=control.host != 0)
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            agent = Agent(setting, control, options.backend, Path(directory))
            limit = agent.limit_gb_s()
            rows = []
            for row in measure(agent, cases, options.variant or list(VARIANTS), options.repeats):
                rows.append(row)
                console.print(
                    {name: row[name] for name in ("case", "variant", "batches", "steady_s", "wrong")}, highlight=False
                )
            console.print(
                f"joined in {agent.join_s:.2f} s, locked {agent.locked_bytes / 1e9:.1f} GB in {agent.lock_s:.2f} s"
            )
            print_results(rows, limit, console)
            agent.close()
    finally:
        if control.host == 0:
            checkpoint.unlink(missing_ok=True)
    if control.host == 0:
        name = torch.cuda.get_device_name(index) if on_gpu else platform.processor()
        machine = {
            "device": name,
            "hosts": control.hosts,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        options.out.write_text(json.dumps({"machine": machine, "limit_gb_s": limit, "results": rows}, indent=1))
    control.gather(None)


if __name__ == "__main__":
    main()
