"""Corruption in rings of random plans: several agents and ranks, slices of tensors, tight rings. Each case is caught on arrival.

A seed makes one case, and is named where it fails; CKPT_CORRUPTION_SEED=N runs that one alone.
"""

import os
import sys
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path

from spoiling import KINDS, Bytes, Way, spoil

from ckpt_core.config import VerifyLevel
from ckpt_core.errors import CkptError, TransferTimeout, TransportError, VerificationError
from ckpt_core.incoming import Incoming
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.pipeline import Outgoing, receive, send
from ckpt_core.plan import make_plan
from ckpt_core.plan_parts import PlanParts
from ckpt_core.polling import Poller
from ckpt_core.pool_digests import PoolDigests
from ckpt_core.pool_file import stage_tensors
from ckpt_core.transport.local import LocalRing, LocalRingReader, LocalRingWriter
from ckpt_core.verify import Verifier
from ckpt_core.wanted import Wanted

LONG_S = 20.0
CHUNK = 50
CASES = dict.fromkeys(KINDS, 100)
ALONE = os.environ.get("CKPT_CORRUPTION_SEED")
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)


# -- what a seed makes -------------------------------------------------------------------------------------------------
def tensors_by(rng):
    shapes = [[rng.randint(1, 12) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(3, 8))]
    shapes += rng.choices(shapes, k=3)  # some of one size
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    made = [torch.randint(0, 200, shape, generator=generator).to(rng.choice(DTYPES)) for shape in shapes]
    return {f"m{number % 3}.t{number}": tensor for number, tensor in enumerate(made)}


def box_by(rng, shape):
    start = [rng.randrange(extent) for extent in shape]
    sizes = [rng.randint(1, extent - first) for extent, first in zip(shape, start, strict=True)]
    return Box(start=tuple(start), shape=tuple(sizes))


def layout_by(rng, tensors):
    entries = []
    for name in rng.sample(sorted(tensors), rng.randint(len(tensors) // 2, len(tensors))):
        boxes = [None] if rng.random() < 0.4 else [box_by(rng, tensors[name].shape) for _ in range(rng.randint(1, 2))]
        group, cut = name.split(".")[0] if rng.random() < 0.5 else "", rng.random() < 0.5
        entries += [LayoutEntry(tensor=name, box=box, group=group, cut=cut) for box in dict.fromkeys(boxes)]
    return Layout(entries=tuple(entries))


def ways_by(rng, sent, tensors):
    """A random plan, as each rank sees it."""
    layouts = [layout_by(rng, tensors) for _ in range(rng.randint(1, 3))]
    sizes = {"ring_bytes": rng.randint(256, 6000), "bucket_bytes": rng.randint(256, 3000)}
    plan = make_plan(sent.manifest, layouts, agents=rng.randint(1, 3), **sizes)
    return [Way(plan=plan, receiver=number, layout=layout, sent=sent) for number, layout in enumerate(layouts)]


def case_by(rng, kind, directory):
    """Ways of a random plan, the rank that suffers, and what it finds. Plans without room for this kind are no cases."""
    while True:
        tensors = tensors_by(rng)
        index = stage_tensors(tensors, directory)
        sent = Bytes(index)
        ways = ways_by(rng, sent, tensors)
        victim = rng.randrange(len(ways))
        if (spoilt := spoil(kind, rng, ways[victim])) is not None:
            return ways, victim, spoilt
        sent.close()
        Path(index.files[0].path).unlink()


# -- on its way --------------------------------------------------------------------------------------------------------
class Transfer:
    """Every agent and rank of a plan in a thread; the first failure aborts all."""

    def __init__(self, ways, victim, spoilt):
        self.ways, self.victim, self.spoilt = ways, victim, spoilt
        self.plan, self.sent = ways[0].plan, ways[0].sent
        self.rings = [
            LocalRing(owner=owner, receivers=self.plan.receivers, ring_bytes=self.plan.ring_bytes)
            for owner in range(self.plan.agents)
        ]
        self.verifiers = [Verifier(VerifyLevel.ARRIVAL, digests) for digests in self._digests()]
        self.aborted = threading.Event()
        self.errors = {}

    def _digests(self):
        parts, manifest = PlanParts(self.sent.manifest), self.sent.manifest
        for way in self.ways:
            parts.add(self.plan, way.receiver, way.layout)
        digests = PoolDigests(self.sent.pool, share=1, told=lambda _done: None).of_parts(manifest, parts.parts)
        found = parts.gathered([(parts.parts, digests)])
        return [parts.of_rank(way.receiver, found) for way in self.ways]

    def run(self):
        calls = [(self._send, f"agent {owner}", owner) for owner in range(self.plan.agents)]
        calls += [(self._receive, f"rank {way.receiver}", way.receiver) for way in self.ways]
        threads = [threading.Thread(target=self._run, args=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LONG_S)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        return self.errors

    def _run(self, call, who, number):
        try:
            call(number)
        except CkptError as error:
            self.errors[who] = error
            self.aborted.set()

    def _poller(self):
        return Poller(check=self._check, deadline=time.monotonic() + LONG_S, expired=TransferTimeout)

    def _check(self):
        if self.aborted.is_set():
            raise TransportError("aborted")

    def _send(self, owner):
        outgoing = Outgoing(self.plan, owner, self.sent.pool, self.sent.manifest)
        send(outgoing, writer=LocalRingWriter(self.rings[owner]), poller=self._poller())

    def _receive(self, receiver):
        readers = [LocalRingReader(ring, receiver=receiver) for ring in self.rings]
        incoming = Incoming(self.plan, Wanted(self.sent.manifest, self.ways[receiver].layout))
        incoming.map(readers, self.plan.ring_bytes)

        def consume(step):
            if receiver == self.victim and step.index in self.spoilt:
                data = self.spoilt[step.index]
                self.rings[step.owner].bytes[step.ring_offset_bytes : step.ring_offset_bytes + data.size] = data
            bucket = incoming.of(step)
            self.verifiers[receiver].arrived(bucket, bucket.parts)

        receive(self.plan, receiver, readers=readers, consume=consume, poller=self._poller())


def check(kind, seed, directory):
    """Nothing is said of the plan as it is; of other bytes, the rank that finds them or one that shares its ring."""
    ways, victim, spoilt = case_by(Random(f"{kind} {seed}"), kind, directory)
    try:
        clean = Transfer(ways, victim, {}).run()
        assert clean == {}, f"seed {seed} of {kind}: without corruption: {clean}"
        errors = Transfer(ways, victim, spoilt).run()
        who = f"seed {seed} of {kind}: buckets {sorted(spoilt)} were spoilt for rank {victim}, they said {errors}"
        assert f"rank {victim}" in errors, who
        assert any(isinstance(error, VerificationError) for error in errors.values()), who
    finally:
        ways[0].sent.close()


@pytest.mark.parametrize(
    ("kind", "first"), [(kind, first) for kind, count in CASES.items() for first in range(0, count, CHUNK)]
)
def test_corruption_in_a_ring_is_caught_on_arrival(kind, first, tmp_path):
    seeds = range(first, first + CHUNK)
    for seed in seeds if ALONE is None else {*seeds} & {int(ALONE)}:
        check(kind, seed, tmp_path)
