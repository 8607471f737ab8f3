"""Random plans through local rings in threads: every byte arrives, in order, and nobody waits for ever."""

import tempfile
import threading
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_core.cpu import CpuDevice
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing, receive, send
from ckpt_core.plan import check_plan, make_plan
from ckpt_core.polling import Poller
from ckpt_core.pool_file import stage_tensors
from ckpt_core.staging import HostPool
from ckpt_core.transport.local import Faults, LocalRing, LocalRingReader, LocalRingWriter
from ckpt_core.wanted import Wanted

DEADLINE_S = 20.0
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)


class Gate(threading.Event):
    """Opens when it was looked at that often."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def is_set(self):
        self.looks -= 1
        return self.looks < 0


@st.composite
def checkpoints(draw):
    tensors = {}
    for number in range(draw(st.integers(1, 8))):
        shape = draw(st.lists(st.integers(0, 12), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(number)
        raw = torch.randint(0, 100, shape, generator=generator)
        tensors[f"m{number % 3}.t{number}"] = raw.to(dtype)
    return tensors


@st.composite
def boxes(draw, shape):
    start = [draw(st.integers(0, extent)) for extent in shape]
    return Box(
        start=tuple(start),
        shape=tuple(draw(st.integers(0, extent - first)) for extent, first in zip(shape, start, strict=True)),
    )


@st.composite
def layouts(draw, tensors):
    entries = []
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), unique=True)):
        whole = draw(st.booleans())
        box = None if whole else draw(boxes(tuple(tensors[name].shape)))
        group = name.split(".")[0] if draw(st.booleans()) else ""
        entries.append(LayoutEntry(tensor=name, box=box, group=group, cut=draw(st.booleans())))
    return Layout(entries=tuple(entries))


@st.composite
def cases(draw):
    tensors = draw(checkpoints())
    return {
        "tensors": tensors,
        "layouts": draw(st.lists(layouts(tensors), min_size=1, max_size=3)),
        "agents": draw(st.integers(1, 3)),
        "ring_bytes": draw(st.integers(256, 6000)),
        "bucket_bytes": draw(st.integers(256, 3000)),
        "holds": draw(st.dictionaries(st.integers(1, 6), st.integers(0, 40), max_size=3)),
    }


def poller():
    return Poller(check=lambda: None, deadline=time.monotonic() + DEADLINE_S, expired=TimeoutError)


def transfer(plan, manifest, pool, holds):
    """What each receiver got: (step index, tensor, box, bytes) in order."""
    rings = [
        LocalRing(owner=owner, receivers=plan.receivers, ring_bytes=plan.ring_bytes) for owner in range(plan.agents)
    ]
    got = [[] for _ in range(plan.receivers)]
    failed = []

    def agent(owner):
        faults = Faults(hold={seq: Gate(looks) for seq, looks in holds.items()})
        writer = LocalRingWriter(rings[owner], faults)
        send(Outgoing(plan, owner, pool, manifest), writer=writer, poller=poller())

    def rank(receiver):
        readers = [LocalRingReader(ring, receiver=receiver) for ring in rings]

        def consume(step):
            reader = readers[step.owner]
            for piece in step.bucket.pieces:
                view = reader.view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes)
                got[receiver].append((step.index, piece.tensor, piece.box, view.numpy().tobytes()))

        receive(plan, receiver, readers=readers, consume=consume, poller=poller())

    def run(call, number):
        try:
            call(number)
        except Exception as error:  # noqa: BLE001 shown by the test's own thread
            failed.append(error)

    calls = [(agent, owner) for owner in range(plan.agents)] + [(rank, number) for number in range(plan.receivers)]
    threads = [threading.Thread(target=run, args=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert failed == []
    return got


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_every_byte_arrives_in_order(case):
    tensors = case["tensors"]
    with tempfile.TemporaryDirectory() as directory:
        index = stage_tensors(tensors, Path(directory))
        manifest = Manifest.from_index(index)
        plan = make_plan(
            manifest,
            case["layouts"],
            agents=case["agents"],
            ring_bytes=case["ring_bytes"],
            bucket_bytes=case["bucket_bytes"],
        )
        check_plan(plan, manifest, {number: Wanted(manifest, layout) for number, layout in enumerate(case["layouts"])})
        pool = HostPool(CpuDevice())
        pool.adopt(index)
        try:
            got = transfer(plan, manifest, pool, case["holds"])
        finally:
            pool.close()
    for receiver, layout in enumerate(case["layouts"]):
        wanted_steps = [step.index for step in plan.steps if receiver in step.receivers]
        assert list(dict.fromkeys(step for step, *_ in got[receiver])) == wanted_steps
        filled = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
        for _, number, box, data in got[receiver]:
            name = manifest.tensors[number].name
            part = Box.whole(tensors[name].shape) if box is None else box
            assert data == raw(tensors[name][part.slices])
            filled[name][part.slices] = True
        for entry in layout.entries:
            needed = Box.whole(tensors[entry.tensor].shape) if entry.box is None else entry.box
            assert bool(filled[entry.tensor][needed.slices].all())
