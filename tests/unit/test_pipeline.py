"""Agents and ranks in threads over local rings, with delays and faults: right bytes in order, or a typed error in time."""

import re
import threading
import time

import pytest
import torch

from ckpt_core.config import VerifyLevel
from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import CkptError, PeerLost, TransferTimeout, TransportError, VerificationError
from ckpt_core.incoming import Incoming
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing, receive, send
from ckpt_core.plan import make_plan
from ckpt_core.plan_parts import PlanParts
from ckpt_core.polling import Poller
from ckpt_core.pool_digests import PoolDigests
from ckpt_core.pool_file import stage_tensors
from ckpt_core.staging import HostPool
from ckpt_core.transport.local import Faults, LocalRing, LocalRingReader, LocalRingWriter
from ckpt_core.verify import Verifier
from ckpt_core.wanted import Wanted

LONG_S = 20.0
SHORT_S = 0.3


@pytest.fixture
def checkpoint(tmp_path):
    """Ten tensors of 1000 bytes, no two alike, as a pool and its manifest."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{number}": torch.randint(0, 256, (10, 100), dtype=torch.uint8, generator=generator) for number in range(10)
    }
    index = stage_tensors(tensors, tmp_path)
    pool = HostPool(CpuDevice())
    pool.adopt(index)
    names = [extent.name for extent in index.extents]
    yield Manifest.from_index(index, {name: pool.digest(name) for name in names}), pool
    pool.close()


class Gate(threading.Event):
    """Opens when it was looked at that often."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def is_set(self):
        self.looks -= 1
        return self.looks < 0


class Transfer:
    """One plan on its way, every agent and rank in a thread; the first failure aborts all, as a controller would."""

    def __init__(self, plan, manifest, pool, *, faults=None, timeout_s=LONG_S, abort_on_failure=True):
        self.plan, self.manifest, self.pool = plan, manifest, pool
        self.rings = [
            LocalRing(owner=owner, receivers=plan.receivers, ring_bytes=plan.ring_bytes) for owner in range(plan.agents)
        ]
        self.faults = faults or {}
        self.timeout_s = timeout_s
        self.abort_on_failure = abort_on_failure
        self.aborted = threading.Event()
        self.errors = {}
        self.stats = {}
        self.steps = [[] for _ in range(plan.receivers)]
        expected = digests_of(plan, manifest, pool)
        self.arrival = [Verifier(VerifyLevel.ARRIVAL, digests) for digests in expected]
        self.before_consume = lambda _receiver, _step: None

    def run(self):
        calls = {f"agent {owner}": (self._send, owner) for owner in range(self.plan.agents)}
        calls |= {f"rank {receiver}": (self._receive, receiver) for receiver in range(self.plan.receivers)}
        threads = [threading.Thread(target=self._run, args=(who, *call), daemon=True) for who, call in calls.items()]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + self.timeout_s + LONG_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "a deadlock: not even the deadline ended it"
        return self

    def _run(self, who, call, number):
        try:
            call(number)
        except CkptError as error:
            self.errors[who] = error
            if self.abort_on_failure:
                self.aborted.set()

    def _poller(self):
        return Poller(
            check=self._check,
            deadline=time.monotonic() + self.timeout_s,
            expired=lambda what: TransferTimeout(f"waited for {what}"),
        )

    def _check(self):
        if self.aborted.is_set():
            raise TransportError("aborted")

    def _send(self, owner):
        writer = LocalRingWriter(self.rings[owner], self.faults.get(owner))
        outgoing = Outgoing(self.plan, owner, self.pool, self.manifest)
        self.stats[owner] = send(outgoing, writer=writer, poller=self._poller())

    def _receive(self, receiver):
        readers = [LocalRingReader(ring, receiver=receiver) for ring in self.rings]
        incoming = Incoming(self.plan, Wanted(self.manifest, whole_layout(self.manifest)))
        incoming.map(readers, self.plan.ring_bytes)

        def consume(step):
            self.before_consume(receiver, step)
            self.steps[receiver].append(step.index)
            bucket = incoming.of(step)
            self.arrival[receiver].arrived(bucket, bucket.parts)

        receive(self.plan, receiver, readers=readers, consume=consume, poller=self._poller())

    def assert_complete(self):
        assert self.errors == {}
        for receiver, steps in enumerate(self.steps):
            assert steps == [step.index for step in self.plan.steps if receiver in step.receivers]
        assert [ring.published for ring in self.rings] == [
            max((step.seq for step in self.plan.steps if step.owner == owner), default=0)
            for owner in range(self.plan.agents)
        ]


def digests_of(plan, manifest, pool):
    """By receiver; each takes whole buckets."""
    parts = PlanParts(manifest)
    for receiver in range(plan.receivers):
        parts.add(plan, receiver, whole_layout(manifest))
    digests = PoolDigests(pool, share=1, told=lambda _done: None).of_parts(manifest, parts.parts)
    found = parts.gathered([(parts.parts, digests)])
    return [parts.of_rank(receiver, found) for receiver in range(plan.receivers)]


def plan_of(manifest, *, agents=1, receivers=1, ring_bytes=4096, bucket_bytes=1024, layouts=None):
    layouts = layouts or [whole_layout(manifest)] * receivers
    return make_plan(manifest, layouts, agents=agents, ring_bytes=ring_bytes, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("receivers", [1, 3])
def test_every_byte_arrives_in_order(checkpoint, agents, receivers):
    manifest, pool = checkpoint
    plan = plan_of(manifest, agents=agents, receivers=receivers)
    transfer = Transfer(plan, manifest, pool).run()
    transfer.assert_complete()
    assert [arrival.arrived_bytes for arrival in transfer.arrival] == [manifest.size_bytes] * receivers
    assert sum(stats.sent_bytes for stats in transfer.stats.values()) == plan.size_bytes


@pytest.mark.parametrize(
    ("ring_bytes", "bucket_bytes"),
    [(1024, 1024), (1280, 1024), (2048 + 256, 2048), (4096, 3072), (256, 256)],
    ids=["depth one", "over half", "over half, two tensors", "three quarters", "grown to one tensor"],
)
def test_tight_rings_work(checkpoint, ring_bytes, bucket_bytes):
    manifest, pool = checkpoint
    plan = plan_of(manifest, agents=2, receivers=2, ring_bytes=ring_bytes, bucket_bytes=bucket_bytes)
    transfer = Transfer(plan, manifest, pool).run()
    transfer.assert_complete()
    assert [arrival.arrived_bytes for arrival in transfer.arrival] == [manifest.size_bytes] * 2


def test_ranks_that_need_different_things_get_theirs(checkpoint):
    manifest, pool = checkpoint
    rows = Box(start=(0, 0), shape=(5, 100))
    layouts = [
        Layout(entries=tuple(LayoutEntry(tensor=f"t{number}") for number in range(5))),
        Layout(entries=(LayoutEntry(tensor="t9", box=rows, cut=True), LayoutEntry(tensor="t4"))),
        Layout(entries=()),
    ]
    plan = plan_of(manifest, agents=2, layouts=layouts, ring_bytes=1024)
    transfer = Transfer(plan, manifest, pool).run()
    transfer.assert_complete()
    assert transfer.steps[2] == []
    assert transfer.arrival[0].arrived_bytes == 5000


def test_a_plan_of_nothing_ends_at_once(checkpoint):
    manifest, pool = checkpoint
    transfer = Transfer(plan_of(manifest, layouts=[Layout(entries=())]), manifest, pool).run()
    transfer.assert_complete()
    assert transfer.stats[0].sent_bytes == 0


def test_late_publication_delays_and_nothing_else(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, agents=2, receivers=2, ring_bytes=2048)
    faults = {owner: Faults(hold={seq: Gate(20 * owner + seq) for seq in range(1, 6)}) for owner in range(2)}
    Transfer(plan, manifest, pool, faults=faults).run().assert_complete()


def test_a_slow_rank_finds_its_bucket_as_it_was_sent(checkpoint):
    """The fast rank goes as far as the ring allows while the slow one still reads the first bucket."""
    manifest, pool = checkpoint
    plan = plan_of(manifest, receivers=2, ring_bytes=4096)
    overwrites = next(step for step in plan.steps if step.free_after_seq >= 1)
    transfer = Transfer(plan, manifest, pool)
    fast_is_there = threading.Event()

    def pace(receiver, step):
        if receiver == 1 and step.index == overwrites.index - 1:
            fast_is_there.set()
        if receiver == 0 and step.index == 0:
            assert fast_is_there.wait(LONG_S)
            assert transfer.rings[0].published == overwrites.seq - 1  # the agent stopped before it

    transfer.before_consume = pace
    transfer.run().assert_complete()


def test_a_rank_that_never_reads_stops_the_agent_until_its_deadline(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, ring_bytes=1024)
    writer = LocalRingWriter(LocalRing(owner=0, receivers=1, ring_bytes=plan.ring_bytes))
    poller = Poller(check=lambda: None, deadline=time.monotonic() + SHORT_S, expired=TransferTimeout)
    with pytest.raises(TransferTimeout, match="room in the ring of agent 0 for bucket 1"):
        send(Outgoing(plan, 0, pool, manifest), writer=writer, poller=poller)
    assert writer.done() == 0


def test_an_agent_waits_for_the_last_bucket_to_be_read(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, ring_bytes=1 << 20)
    writer = LocalRingWriter(LocalRing(owner=0, receivers=1, ring_bytes=plan.ring_bytes))
    poller = Poller(check=lambda: None, deadline=time.monotonic() + SHORT_S, expired=TransferTimeout)
    with pytest.raises(TransferTimeout, match="the ranks to read agent 0's last bucket"):
        send(Outgoing(plan, 0, pool, manifest), writer=writer, poller=poller)


def test_a_bucket_that_is_never_published_ends_by_the_deadline_on_both_sides(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, receivers=2)
    faults = {0: Faults(hold={3: threading.Event()})}
    start = time.monotonic()
    transfer = Transfer(plan, manifest, pool, faults=faults, timeout_s=SHORT_S, abort_on_failure=False).run()
    assert time.monotonic() - start < LONG_S
    assert {who: type(error) for who, error in transfer.errors.items()} == dict.fromkeys(
        ["agent 0", "rank 0", "rank 1"], TransferTimeout
    )
    assert "bucket 2 from agent 0" in str(transfer.errors["rank 0"])
    assert transfer.steps == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("fault", "ring_bytes"),
    [
        (Faults(flip={3: 999}), 1024),
        (Faults(flip={3: 999}), 1 << 20),
        (Faults(drop=frozenset({3})), 1024),
        (Faults(drop=frozenset({3})), 1 << 20),
        (Faults(early=frozenset({3})), 1024),  # depth one: the agent's next call comes after the rank has looked
    ],
    ids=["flip", "flip, large ring", "drop", "drop, large ring", "early"],
)
def test_wrong_bytes_are_caught_by_their_digest(checkpoint, fault, ring_bytes):
    manifest, pool = checkpoint
    plan = plan_of(manifest, ring_bytes=ring_bytes)
    transfer = Transfer(plan, manifest, pool, faults={0: fault}).run()
    error = transfer.errors["rank 0"]
    assert isinstance(error, VerificationError)
    assert re.match(
        r"tensor 't2' \(part 0 of bucket 2, 1000 bytes\): arrived with digest [0-9a-f]{16}, expected", str(error)
    )
    assert transfer.steps == [[0, 1, 2]]


def test_a_lost_agent_ends_all(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, agents=2, receivers=2, ring_bytes=2048)
    transfer = Transfer(plan, manifest, pool, faults={1: Faults(lose_at=3)}).run()
    assert isinstance(transfer.errors.pop("agent 1"), PeerLost)
    assert {type(error) for error in transfer.errors.values()} == {TransportError}
    assert {"rank 0", "rank 1"} <= set(transfer.errors)


def test_an_abort_stops_a_busy_agent_in_the_middle(checkpoint):
    manifest, pool = checkpoint
    plan = plan_of(manifest, ring_bytes=1 << 20)
    ring = LocalRing(owner=0, receivers=1, ring_bytes=plan.ring_bytes)

    def abort():
        raise TransportError("aborted")

    with pytest.raises(TransportError, match="aborted"):
        send(
            Outgoing(plan, 0, pool, manifest),
            writer=LocalRingWriter(ring),
            poller=Poller(check=abort, deadline=time.monotonic() + LONG_S, expired=TransferTimeout),
        )
    assert ring.published == 1
