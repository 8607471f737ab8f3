"""How much of a library's own read rate is left when we read: 1 GiB out of an owner's memory, on one machine.

    python benchmarks/p2p_raw.py --json results.json

The owner is a `ckpt export` process; the reader is this one. In each repeat, one after the other: the library's own interface (one
read of everything; a batch with one read per tensor), then ours, `Fetch` into its slots, without the digests of leaves and with
them: for tensors of 64 MiB that are not cut (an engine's first update), and cut for buckets of CPUs and of GPUs (later ones). The
ring is left out: what is proved is dropped.

NIXL takes shared memory on one machine; with UCX_TLS=tcp in the environment it is kept to TCP.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
from generated import write_checkpoint
from p2p_library import OWN
from p2p_owner import Exporter, exporting
from rich.console import Console
from rich.table import Table
from shapes import Shape

from ckpt_core.cpu import CpuDevice
from ckpt_core.device import DevicePart, HostBytes
from ckpt_core.errors import TransferTimeout
from ckpt_core.layout import Layout, LayoutEntry
from ckpt_core.leaf_digest import leaves_of
from ckpt_core.manifest import Manifest
from ckpt_core.p2p.covers import Cover, covers_of, slot_bytes
from ckpt_core.p2p.fetching import Fetch
from ckpt_core.p2p.incoming_bucket import Leaves
from ckpt_core.p2p.offers import index_of, read_offer
from ckpt_core.p2p.owners import Owners
from ckpt_core.plan import Plan, Step, make_plan
from ckpt_core.polling import Poller
from ckpt_core.relaying import Slots
from ckpt_core.source import SourceIndex
from ckpt_core.transport.p2p.base import Library, Memory, OneSided
from ckpt_core.transport.p2p.choice import open_library

MIB = 1 << 20
TENSORS, TENSOR_SHAPE = 16, (8192, 4096)  # 64 MiB each
BUCKETS_MIB = {
    "whole tensors": 0,
    "4 MiB buckets": 4,
    "32 MiB buckets": 32,
}  # a quarter of the default ring on CPUs and on GPUs
_SLOTS = 6
_LONGEST_S = 120.0


@dataclass(slots=True, kw_only=True)
class Row:
    """One way to read; a list has one place per repeat. CPU seconds are those of one repeat (median)."""

    library: str
    way: str
    gb_s: list[float] = field(default_factory=list)
    reader_cpu_s: list[float] = field(default_factory=list)
    owner_cpu_s: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """GB/s."""
        return statistics.median(self.gb_s)


class Dropped:
    """A ring without ranks: what is filled in is done at once."""

    def __init__(self) -> None:
        self._last = 0

    def fill(self, step: Step, _parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        """See RingWriter."""
        self._last = step.seq

    def advance(self) -> int:
        """See RingWriter."""
        return self._last

    done = advance


class Ours:
    """Our reads of a version, with slots as an agent has them."""

    def __init__(self, library: OneSided, index: SourceIndex, bucket_mib: int) -> None:
        assert index.remote is not None
        self._library, self._owners = library, index.remote.owners
        self._leaves = Leaves(index.extents, index.remote.leaves)
        self._plan = plan_of(index, bucket_mib)
        self._covers = [covers_of(step, index.extents) for step in self._plan.steps]
        room = max(map(slot_bytes, self._covers))
        self._slots = Slots(_SLOTS, room, CpuDevice())
        library.expose(Memory(address=self._slots.free[0].ctypes.data, size_bytes=_SLOTS * room))

    def proved(self) -> None:
        """Read, compare digests, drop."""
        fetch = Fetch(
            self._leaves,
            self._plan.steps,
            self._covers,
            owners=Owners(self._library, self._owners),
            slots=self._slots.free,
            spare=self._no_spare,
            writer=Dropped(),  # type: ignore[arg-type]
        )
        deadline = time.monotonic() + _LONGEST_S
        fetch.run(Poller(check=lambda: None, deadline=deadline, expired=TransferTimeout))

    def unproved(self) -> None:
        """The same without digests."""
        with mock.patch.object(Cover, "check", new=_unchecked):
            self.proved()

    def _no_spare(self) -> HostBytes:
        raise TransferTimeout("the owner was silent; measure again")


def _unchecked(*_: object) -> None:
    """Instead of a comparison."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tensors", type=int, default=TENSORS, help="64 MiB each")
    parser.add_argument("--library", type=Library, action="append", help="default: both")
    options = parser.parse_args()
    size_bytes = options.tensors * shapes(1)[0].size_bytes
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        checkpoint = Path(scratch) / "model.safetensors"
        write_checkpoint(checkpoint, shapes(options.tensors), seed=1)
        cases = [
            case
            for library in options.library or list(Library)
            for case in stack.enter_context(ways(library, checkpoint, Path(scratch)))
        ]
        rows = measure(cases, options.repeats, size_bytes)
    rates = digest_gb_s(options.repeats)
    Console(width=140).print(table(rows, size_bytes))
    print(
        f"digests of leaves in one thread, out of the cache and out of memory: {rates[0]:.1f} and {rates[1]:.1f} GB/s"
    )
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        about |= {"date": time.strftime("%Y-%m-%d"), "bytes": size_bytes, "ucx_tls": os.environ.get("UCX_TLS", "")}
        about |= {"digest_gb_s_cached": rates[0], "digest_gb_s_memory": rates[1]}
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way with its owner; `run` reads everything once."""

    row: Row
    run: Callable[[], None]
    owner: Exporter


@contextmanager
def ways(library: Library, checkpoint: Path, scratch: Path) -> Iterator[list[Case]]:
    """All ways to read by one library, while its owner runs."""
    with ExitStack() as stack:
        owner = stack.enter_context(exporting(checkpoint, scratch / f"{library.value}.json", library))
        offer = read_offer(owner.offer)
        own = OWN[library](offer)
        opened = open_library(library, host="127.0.0.1")
        index = index_of([offer], host="127.0.0.1")
        runs = {"own, one read": own.one, "own, a batch": own.batch}
        for name, mib in BUCKETS_MIB.items():
            ours = Ours(opened, index, mib)
            runs[f"ours, {name}, no digests"] = ours.unproved
            runs[f"ours, {name}"] = ours.proved
        yield [Case(row=Row(library=library.value, way=way), run=run, owner=owner) for way, run in runs.items()]


def measure(cases: Sequence[Case], repeats: int, size_bytes: int) -> list[Row]:
    """All in turn, so often, after one that warms up."""
    for case in cases:
        case.run()
    for _ in range(repeats):
        for case in cases:
            cpu, owner_cpu, start = time.process_time(), case.owner.cpu_s(), time.perf_counter()
            case.run()
            case.row.gb_s.append(size_bytes / (time.perf_counter() - start) / 1e9)
            case.row.reader_cpu_s.append(time.process_time() - cpu)
            case.row.owner_cpu_s.append(case.owner.cpu_s() - owner_cpu)
    return [case.row for case in cases]


def shapes(count: int) -> list[Shape]:
    """Of the checkpoint."""
    return [Shape(name=f"t{number:03}", shape=TENSOR_SHAPE, dim=None) for number in range(count)]


def plan_of(index: SourceIndex, bucket_mib: int) -> Plan:
    """For one rank that takes everything, in buckets of this size; with 0 every tensor whole."""
    manifest = Manifest.from_index(index)
    layout = Layout(entries=tuple(LayoutEntry(tensor=one.name, cut=bucket_mib > 0) for one in manifest.tensors))
    bucket_bytes = (bucket_mib or 4) * MIB
    return make_plan(manifest, [layout], agents=1, ring_bytes=4 * bucket_bytes, bucket_bytes=bucket_bytes)


def digest_gb_s(repeats: int) -> tuple[float, float]:
    """Of `leaves_of`: over bytes that were just there, and over so many that no cache holds them."""
    data = np.ones(512 * MIB, dtype=np.uint8)
    return _digest_gb_s(data[:MIB], repeats * 256), _digest_gb_s(data, repeats)


def _digest_gb_s(data: HostBytes, repeats: int) -> float:
    leaves_of(data)
    start = time.perf_counter()
    for _ in range(repeats):
        leaves_of(data)
    return repeats * data.size / (time.perf_counter() - start) / 1e9


def table(rows: Sequence[Row], size_bytes: int) -> Table:
    """For people. Shares are of the faster of the library's own ways."""
    made = Table(title=f"{size_bytes / 2**30:g} GiB on loopback, medians")
    for name in ("library", "way", "GB/s", "share of own", "reader's CPU s", "owner's CPU s"):
        made.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        best = max(other.median for other in rows if other.library == row.library and other.way.startswith("own"))
        cpu = [f"{statistics.median(times):.3f}" for times in (row.reader_cpu_s, row.owner_cpu_s)]
        made.add_row(row.library, row.way, f"{row.median:.2f}", f"{row.median / best:.1%}", *cpu)
    return made


if __name__ == "__main__":
    main()
