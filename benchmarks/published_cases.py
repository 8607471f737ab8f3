"""The ways of `published_table.py` that are this project's: updates of a stand-in engine, timed and checked one by one.

routed: each rank's agent copies the slices of its rank, and no byte goes anywhere else. everywhere: whole tensors; each byte
crosses one GPU's bus, every rank copies it out of that GPU's ring into its own GPU's memory, and only then takes its slices: what
a broadcast does, without a collective. p2p: owners offer the checkpoint out of host memory, and ranks on the other half
of the GPUs join by one-sided reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from mock_engine import MockEngine, gpu_uuid, plugin
from mock_worker import MockOptions
from p2p_owner import exporting
from published_budget import Selection
from shapes import MODELS

import ckpt_core
from ckpt_core import Peers
from ckpt_core.config import MIB, Undo, UpdateConfig, VerifyLevel
from ckpt_core.metrics import Stage, UpdateReport
from ckpt_core.transport.p2p.base import Library

SEED = 1


class Way(Enum):
    """How weights come into the GPUs."""

    PEER = "checkpoint-engine"
    EVERYWHERE = "everywhere"
    ROUTED = "routed"
    P2P = "p2p"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all ways of a model share. `world`: GPUs (or ranks on CPU); `repeats` are after the first update."""

    selection: Selection
    checkpoint: Path
    scratch: Path
    world: int
    device: str
    repeats: int
    p2p_repeats: int
    library: Library


@dataclass(slots=True, kw_only=True)
class Row:
    """What a way gave. Seconds; GB are 1e9 bytes.

    Attributes:
        gpus: that take weights.
        into_gpu_gb: into the memory of the GPU that gets most.
        seconds: of each update after the first, from begin to the last rank verified; checkpoint-engine's `update`.
        pause_s: of the same updates, in which an engine does not serve.
        call_s: of the same updates, as the caller waits.
        register_s: to lock or pin the checkpoint; p2p: until the last owner offers it.
        gpu_mib: memory of a GPU beyond the engine's own, at most.
        wrong: elements, over all updates.
        limit_gb_s: from pinned host memory into these GPUs at once, the better of right before and right after.
    """

    way: str
    selection: Selection
    gpus: int
    size_gb: float
    into_gpu_gb: float
    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    pause_s: list[float] = field(default_factory=list)
    call_s: list[float] = field(default_factory=list)
    register_s: float = 0.0
    gather_s: float | None = None
    gpu_mib: float = 0.0
    wrong: int = 0
    limit_gb_s: float = 0.0
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def run_way(way: Way, setting: Setting) -> Row:
    """All updates of one of this project's ways."""
    if way is Way.P2P:
        return _joined(setting)
    row = _row(way, setting, gpus=setting.world)
    with _engine(setting, setting.world, cut=way is Way.ROUTED) as ranks:
        config = UpdateConfig(verify=VerifyLevel.NONE, digest_content=False, fingerprint=False, undo=Undo.NONE)
        _measure(row, ranks, setting.checkpoint, config, setting.repeats)
    row.register_s = row.details["first"]["lock_s"]
    return row


def _joined(setting: Setting) -> Row:
    """Owners for one half of the ranks, each with the whole checkpoint; the other half joins."""
    library, half = setting.library, max(1, setting.world // 2)
    row = _row(Way.P2P, setting, gpus=half)
    row.note = f"{library.value} on this host's loopback, {half} owners"
    with ExitStack() as stack:
        start = time.monotonic()
        files = [setting.scratch / f"offer-{number}.json" for number in range(half)]
        for file in files:
            stack.enter_context(exporting(setting.checkpoint, file, library))
        row.register_s = time.monotonic() - start
        ranks = stack.enter_context(_engine(setting, half, cut=True))
        config = UpdateConfig(fingerprint=False, undo=Undo.NONE)
        _measure(row, ranks, Peers(offers=files), config, setting.p2p_repeats)
    return row


def _row(way: Way, setting: Setting, *, gpus: int) -> Row:
    selection = setting.selection
    shapes = MODELS[selection.model](selection.layers)
    sliced = sum(shape.box(0, gpus).size * shape.dtype.itemsize for shape in shapes)
    into_gpu = selection.size_bytes if way is Way.EVERYWHERE else sliced
    return Row(
        way=way.value,
        selection=selection,
        gpus=gpus,
        size_gb=selection.size_bytes / 1e9,
        into_gpu_gb=into_gpu / 1e9,
    )


def _engine(setting: Setting, ranks: int, *, cut: bool) -> MockEngine:
    """The stand-in on the last so many GPUs."""
    options = MockOptions(
        model=setting.selection.model,
        layers=setting.selection.layers,
        world=ranks,
        device=setting.device,
        cut=cut,
        everywhere=not cut,
        instance=uuid4().hex,
    )
    on_gpu = setting.device == "cuda"
    return MockEngine(options, [gpu_uuid(index) for index in range(setting.world)][-ranks:] if on_gpu else ())


def _measure(row: Row, ranks: MockEngine, source: Path | Peers, config: UpdateConfig, repeats: int) -> None:
    """Poison, update, check, over and over; the first update apart."""
    ranks.call("wrong", SEED)  # what this check takes, torch keeps: it is not the update's
    targets = [ckpt_core.Target(engine="mock", url="mock", handle=ranks, plugin=plugin())]
    with _lowest(row, ranks) as watch, ckpt_core.Updater(targets, config=config, on_progress=watch) as updater:
        for number in range(repeats + 1):
            ranks.call("poison")
            report = updater.update(source)
            row.wrong += sum(ranks.call("wrong", SEED))
            _note(row, report, first=number == 0)


@contextmanager
def _lowest(row: Row, ranks: MockEngine) -> Iterator[Callable[[Stage, int, int], None]]:
    """Free memory of the engine's first GPU, watched in the first update only: to ask costs the driver time."""
    if ranks.options.device != "cuda":
        yield lambda _stage, _done, _total: None
        return
    index = [gpu_uuid(number) for number in range(torch.cuda.device_count())].index(ranks.uuids[0])
    before = torch.cuda.mem_get_info(index)[0]

    def watch(_stage: Stage, _done: int, _total: int) -> None:
        if not row.first_s:
            row.gpu_mib = max(row.gpu_mib, (before - torch.cuda.mem_get_info(index)[0]) / MIB)

    yield watch


def _note(row: Row, report: UpdateReport, *, first: bool) -> None:
    seconds = report.stages[Stage.TRANSFER.value]
    row.details["first" if first else "last"] = {
        "stages": report.stages,
        "ring_bytes": report.ring_bytes,
        "lock_s": report.lock_s,
        "locked_bytes": report.locked_bytes,
        "agents": [{name: getattr(stats, name) for name in stats.__struct_fields__} for stats in report.agents],
        "ranks": [{name: getattr(rank.stats, name) for name in rank.stats.__struct_fields__} for rank in report.ranks],
    }
    if first:
        row.first_s = seconds
        row.details["first"] |= {"pause_s": report.pause_s, "call_s": report.seconds}
        return
    row.seconds.append(seconds)
    row.pause_s.append(report.pause_s)
    row.call_s.append(report.seconds)
