"""The rank of `collective.py`: a process that takes updates into its weights, as its agent orders, one order a line."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import msgspec
import torch
from generated import expected_values
from shapes import ITEMSIZE, Shape

from ckpt_core.errors import TransferTimeout
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import receive
from ckpt_core.plan import Plan, Step, make_plan
from ckpt_core.polling import Poller
from ckpt_core.source import open_checkpoint
from ckpt_core.transport.ipc import IpcRingReader
from ckpt_core.wire import RingOffer

MIB = 1 << 20
ROW_ELEMENTS = 2048
DEADLINE_S = 60.0
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Which buckets: `even` ones of cut tensors, else whole tensors, each that is larger than a bucket in one of its own."""

    bucket_mib: float
    ring_mib: float
    even: bool = True

    @property
    def name(self) -> str:
        """For the table."""
        return f"{'even' if self.even else 'uneven'} {self.bucket_mib:g} MiB"


class Order(msgspec.Struct, kw_only=True):
    """What an agent tells its rank: take an update, or (without an offer) check the weights and forget them."""

    case: Case
    offer: RingOffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What agents and ranks know from the start."""

    checkpoint: str
    size_mib: int
    device: str
    index: int

    @property
    def torch_device(self) -> torch.device:
        """Where weights and rings are."""
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", self.index)


def make_shapes(size_mib: int) -> list[Shape]:
    """Tensors of 16 KiB to 32 MiB, sizes spread evenly by logarithm: as uneven as those of a mixture of experts."""
    chance = random.Random(SEED)
    row_bytes = ROW_ELEMENTS * ITEMSIZE
    shapes: list[Shape] = []
    left = size_mib * MIB // row_bytes
    while left > 0:
        rows = min(left, round(4 * 2 ** chance.uniform(0, 11)))
        shapes.append(Shape(name=f"layers.{len(shapes)}.weight", shape=(rows, ROW_ELEMENTS), dim=None))
        left -= rows
    return shapes


@cache
def plan_of(case: Case, manifest: Manifest) -> Plan:
    """One lane and one rank that needs everything."""
    entries = tuple(LayoutEntry(tensor=tensor.name, cut=case.even) for tensor in manifest.tensors)
    sizes = {"ring_bytes": int(case.ring_mib * MIB), "bucket_bytes": int(case.bucket_mib * MIB)}
    return make_plan(manifest, [Layout(entries=entries)], agents=1, **sizes)


def poller() -> Poller:
    """Ends a run that hangs."""
    return Poller(check=lambda: None, deadline=time.monotonic() + DEADLINE_S, expired=TransferTimeout)


class Rank:
    """Weights, and how pieces get there."""

    def __init__(self, setting: Setting) -> None:
        self._device = setting.torch_device
        self._index = setting.index
        self._shapes = make_shapes(setting.size_mib)
        self._manifest = Manifest.from_index(open_checkpoint(setting.checkpoint))
        self._weights = {
            shape.name: torch.zeros(shape.shape, dtype=torch.bfloat16, device=self._device).view(torch.uint8)
            for shape in self._shapes
        }
        self._expected = {
            shape.name: expected_values(shape.name, shape.shape, SEED, self._device).view(torch.uint8)
            for shape in self._shapes
        }
        torch._foreach_copy_([torch.zeros(8, device=self._device)], [torch.ones(8, device=self._device)])

    def take(self, order: Order, ready: Callable[[], None]) -> None:
        """One update; `ready` when all is mapped and looked up."""
        assert order.offer is not None
        plan = plan_of(order.case, self._manifest)
        reader = IpcRingReader(order.offer, receiver=0, receivers=1, device_index=self._index)
        copies = {step.seq: self._copies(step, reader) for step in plan.steps}
        ready()
        receive(
            plan, 0, readers=[reader], consume=lambda step: torch._foreach_copy_(*copies[step.seq]), poller=poller()
        )
        copies.clear()
        reader.close()

    def _copies(self, step: Step, reader: IpcRingReader) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        targets, sources = [], []
        for piece in step.bucket.pieces:
            tensor = self._manifest.tensors[piece.tensor]
            box = piece.box or Box.whole(tensor.shape)
            target = self._weights[tensor.name].view(-1)
            first = box.byte_runs(tensor.shape, ITEMSIZE).first_offset_bytes
            targets.append(target[first : first + piece.size_bytes])
            sources.append(reader.view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes))
        return targets, sources

    def wrong(self) -> int:
        """Tensors that are not those of the checkpoint; forgets all."""
        count = sum(not torch.equal(self._weights[name], expected) for name, expected in self._expected.items())
        for weights in self._weights.values():
            weights.zero_()
        return count


def main() -> None:
    """Obey orders, one a line, until there are no more."""
    setting = msgspec.json.decode(sys.argv[1], type=Setting)
    if setting.device != "cpu":
        torch.cuda.set_device(setting.index)
    rank = Rank(setting)
    for line in sys.stdin:
        order = msgspec.json.decode(line, type=Order)
        if order.offer is None:
            print(rank.wrong(), flush=True)
            continue
        rank.take(order, lambda: print("ready", flush=True))
        print("done", flush=True)


if __name__ == "__main__":
    main()
