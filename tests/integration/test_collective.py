"""Updates of several hosts by collectives: processes on this machine play the hosts, gloo over loopback connects them."""

import json
import os
import runpy
import signal
import socket
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.bucket import ALIGN_BYTES, Bucket, Piece
from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import ConfigError, PeerLost, RendezvousTimeout, TransportError
from ckpt_core.plan import LastWriters, Step
from ckpt_core.transport.collective import CollectiveRingWriter, Schedule, default_batch_bytes
from ckpt_core.transport.groups import CollectiveGroup, MeetingPoint
from ckpt_core.transport.peers import Membership, Peers

Fleet = runpy.run_path(str(Path(__file__).with_name("collective_host.py")))["Fleet"]
LONG_S = 90.0

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


# -- processes that play hosts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("hosts", [2, 3])
def test_random_plans_arrive_bit_by_bit_on_every_host(tmp_path, hosts):
    """Eight updates through one group, the first plan twice with other contents."""
    seeds = [(100 * hosts, 1), (100 * hosts, 2), *[(100 * hosts + 7 * number, number) for number in range(1, 7)]]
    with Fleet(tmp_path, hosts, seeds=seeds) as fleet:
        outcomes = [fleet.rest(host) for host in range(hosts)]
    assert [lines[-1] for lines in outcomes] == [{"closed": True}] * hosts
    assert {len(lines) for lines in outcomes} == {len(seeds) + 1}
    for update in zip(*(lines[:-1] for lines in outcomes), strict=True):
        assert [each["errors"] for each in update] == [{}] * hosts
        assert all(wrong == 0 for each in update for wrong, _ in each["ranks"])
        assert len({json.dumps(each["ranks"]) for each in update}) == 1, "hosts differ"
        assert not any(flag for each in update for flag in each["broken"])
        assert [each["left"] for each in update] == [[]] * hosts, "files that nobody removed"
    first, second = outcomes[0][:2]
    assert all(old != new for old, new in zip(first["ranks"], second["ranks"], strict=True)), (
        "new contents did not arrive"
    )
    assert any(sum(each["batches"]) < each["steps"] for each in outcomes[0][:-1]), "nothing was ever coalesced"


def assert_survivors_lost_a_peer(fleet, hosts):
    for host in range(hosts - 1):
        failed, closed = fleet.rest(host)
        assert "PeerLost" in {kind for kind, _ in failed["errors"].values()}
        assert failed["broken"][0]
        assert failed["left"] == []
        assert closed == {"closed": True}


@pytest.mark.parametrize("where", ["fill", "broadcast"])
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_killed_agent_is_noticed_long_before_the_deadline(tmp_path, hosts, where):
    """At "broadcast" the others have already started theirs."""
    with Fleet(tmp_path, hosts, seeds=[(9, 1), (9, 2)], lanes=1, hang=where, timeout_s=2 * LONG_S) as fleet:
        assert fleet.line(hosts - 1) == {"here": True}
        fleet.processes[-1].send_signal(signal.SIGKILL)
        assert_survivors_lost_a_peer(fleet, hosts)


@pytest.mark.parametrize("where", ["first fill", "broadcast"])
def test_an_agent_that_falls_silent_is_given_up_after_the_deadline(tmp_path, where):
    with Fleet(tmp_path, 2, seeds=[(9, 1)], lanes=1, hang=where, timeout_s=1.0) as fleet:
        assert fleet.line(1) == {"here": True}
        failed = fleet.line(0)
        kind, message = failed["errors"]["agent 0"]
        assert kind == "PeerLost"
        assert ("hosts [1] were not ready" if where == "first fill" else "did not complete") in message
        fleet.processes[1].send_signal(signal.SIGKILL)
        assert fleet.rest(0) == [{"closed": True}]


def test_hosts_with_different_schedules_refuse_each_other(tmp_path):
    with Fleet(tmp_path, 2, seeds=[(9, 1)], lanes=1, other_sources=True) as fleet:
        outcomes = [fleet.rest(host)[0] for host in range(2)]
    kinds = {kind: message for each in outcomes for kind, message in each["errors"].values()}
    assert set(kinds) <= {"TransportError", "PeerLost"}
    assert any("another schedule" in message for each in outcomes for _, message in each["errors"].values())


def test_a_host_that_never_comes_is_a_rendezvous_timeout():
    meeting = MeetingPoint("127.0.0.1", timeout_s=1.0)
    me = Membership(lane="lane", host=0, hosts=2, address="127.0.0.1")
    cpu = torch.device("cpu")
    with pytest.raises(RendezvousTimeout, match="host 0 found 0 of 1"):
        CollectiveGroup.join(me, backend="gloo", device=cpu, store=(meeting.address, meeting.port), timeout_s=0.3)
    meeting.close()


def test_a_meeting_point_that_is_not_there_is_a_rendezvous_timeout():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    me = Membership(lane="lane", host=0, hosts=1, address="127.0.0.1")
    with pytest.raises(RendezvousTimeout, match="no meeting point"):
        CollectiveGroup.join(me, backend="gloo", device=torch.device("cpu"), store=("127.0.0.1", port), timeout_s=0.3)


# -- a group of one host, within this process ------------------------------------------------------------------
@pytest.fixture
def meeting():
    made = MeetingPoint("127.0.0.1", timeout_s=LONG_S)
    yield made
    made.close()


def join(meeting, backend="gloo"):
    return CollectiveGroup.join(
        Membership(lane=f"alone-{backend}", host=0, hosts=1, address="127.0.0.1"),
        backend=backend,
        device=torch.device("cpu"),
        store=(meeting.address, meeting.port),
        timeout_s=LONG_S,
    )


def test_an_unknown_backend_is_refused(meeting):
    with pytest.raises(ConfigError, match="no collective backend 'carrier-pigeon'"):
        join(meeting, "carrier-pigeon")


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_nccl_without_nccl_is_refused(meeting):
    with pytest.raises(ConfigError, match="without NCCL"):
        join(meeting, "nccl")


def test_a_backend_that_a_package_registered_is_found_by_name(meeting, monkeypatch):
    """As torch_npu does with hccl, in both forms that torch knows."""
    plugins = torch.distributed.Backend._plugins
    made = []

    def create(store, rank, size, timeout):
        made.append((rank, size))
        return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)

    def create_extended(options, _):
        return create(options.store, options.group_rank, options.group_size, options.timeout)

    plugin = torch.distributed.Backend._BackendPlugin
    for extended, function in ((False, create), (True, create_extended)):
        monkeypatch.setitem(plugins, "HCCL", plugin(function, extended))
        join(meeting, "hccl").close()
    assert made == [(0, 1), (0, 1)]


def make_step(seq, size, offset, free_after=0):
    piece = Piece(tensor=0, box=None, offset_bytes=0, size_bytes=size)
    bucket = Bucket(index=seq - 1, size_bytes=size, pieces=(piece,))
    return Step(
        index=seq - 1,
        bucket=bucket,
        owner=0,
        seq=seq,
        ring_offset_bytes=offset,
        free_after_seq=free_after,
        receivers=(0,),
    )


class Late:
    """A group whose broadcasts complete when the test says so."""

    def __init__(self, group):
        self.group, self.open = group, False
        group.broadcast = self.broadcast

    def broadcast(self, _regions):
        return type("Mark", (), {"reached": lambda _self: self.open})()


def test_room_is_not_given_away_under_a_broadcast(meeting, tmp_path):
    """A rank that needs nothing of a bucket passes over it at once; the broadcast still reads its bytes."""
    group = join(meeting)
    late = Late(group)
    steps = [make_step(1, 256, 0), make_step(2, 256, 0, free_after=1)]
    schedule = Schedule.of(steps, hosts=1, ring_bytes=256)
    writer = CollectiveRingWriter(
        owner=0,
        receivers=1,
        ring_bytes=256,
        device=CpuDevice(),
        directory=tmp_path,
        group=group,
        schedule=schedule,
        timeout_s=LONG_S,
    )
    writer._sequence.set_done(0, 2)
    writer.fill(steps[0], [(0, np.full(256, 7, np.uint8))])
    assert (writer.advance(), writer.done()) == (0, 0)
    late.open = True
    assert (writer.advance(), writer.done()) == (1, 1)
    late.open = False
    writer.fill(steps[1], [(0, np.full(256, 8, np.uint8))])
    assert (writer.advance(), writer.done()) == (1, 1)
    writer.close()
    assert group.broken, "a batch was on its way"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PeerLost, match="join the lane anew"):
        CollectiveRingWriter(
            owner=0,
            receivers=1,
            ring_bytes=256,
            device=CpuDevice(),
            directory=tmp_path,
            group=group,
            schedule=schedule,
            timeout_s=LONG_S,
        )
    assert list(tmp_path.iterdir()) == []
    group.close()


# -- what the others said --------------------------------------------------------------------------------------
@pytest.fixture
def two():
    """Two hosts' peers, connected to each other."""
    from ckpt_core.transport.peers import _Peer

    ends = socket.socketpair(socket.AF_UNIX)
    listening = socket.create_server(("127.0.0.1", 0))
    calling = socket.create_connection(listening.getsockname())
    answering, _ = listening.accept()
    listening.close()
    for end in ends:
        end.close()
    made = Peers("lane", {1: _Peer(calling)}), Peers("lane", {0: _Peer(answering)})
    yield made
    for peers in made:
        peers.close(goodbye=False)


def heard(peers, *args):
    """What is agreed once the other's words are there; loopback may take a moment."""
    end = time.monotonic() + LONG_S
    while True:
        peers.listen()
        if (got := peers.agreed(*args)) or time.monotonic() > end:
            return got
        os.sched_yield()


def test_what_is_agreed_is_what_the_slowest_is_ready_for(two):
    mine, other = two
    assert mine.agreed(1, 5, 9) == 0
    assert mine.behind(1, 1) == [1]
    other.tell(1, 3, 5)
    assert heard(mine, 1, 5, 9) == 3
    assert mine.agreed(1, 5, 2) == 2
    assert (mine.behind(1, 3), mine.behind(1, 4)) == ([], [1])
    assert mine.agreed(2, 5, 9) == 0, "that was said of an earlier update"
    other.tell(2, 1, 6)
    assert heard(mine, 2, 6, 9) == 1
    assert mine.agreed(1, 5, 9) == 9, "who is in the next update is through with this one"


def test_another_schedule_is_refused(two):
    mine, other = two
    other.tell(1, 1, 5)
    with pytest.raises(TransportError, match="another schedule"):
        heard(mine, 1, 6, 9)


def test_who_said_goodbye_when_all_was_done_is_not_missed(two):
    mine, other = two
    other.tell(1, 4, 5)
    other.close(goodbye=True)
    assert heard(mine, 1, 5, 4) == 4
    with pytest.raises(PeerLost, match="host 1 is gone"):
        heard(mine, 2, 5, 1)


def test_who_goes_without_goodbye_is_lost(two):
    mine, other = two
    other.tell(1, 4, 5)
    other.close(goodbye=False)
    with pytest.raises(PeerLost, match="host 1 is gone"):
        heard(mine, 3, 5, 4)


# -- schedules -------------------------------------------------------------------------------------------------
@st.composite
def lanes(draw):
    """Steps of one lane, as a plan lays them into its ring."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=40))
    ring = max(*sizes, draw(st.integers(1, 40)), 1) if len(sizes) > 1 else max(sizes[0], 1)
    writers, head, steps = LastWriters(), 0, []
    for seq, size in enumerate(sizes, 1):
        head = 0 if head + size > ring else head
        free_after = writers.overwrite(head * ALIGN_BYTES, (head + size) * ALIGN_BYTES, seq)
        steps.append(make_step(seq, size * ALIGN_BYTES, head * ALIGN_BYTES, free_after))
        head += size
    return steps, ring * ALIGN_BYTES


@settings(max_examples=200)
@given(lanes(), st.integers(1, 5), st.data())
def test_a_schedule_sends_every_byte_once_in_order_and_never_waits_for_itself(lane, hosts, data):
    steps, ring_bytes = lane
    sources = data.draw(st.none() | st.lists(st.integers(0, hosts - 1), min_size=len(steps), max_size=len(steps)))
    batch_bytes = data.draw(st.none() | st.integers(1, ring_bytes))
    schedule = Schedule.of(steps, hosts=hosts, ring_bytes=ring_bytes, sources=sources, batch_bytes=batch_bytes)
    limit = default_batch_bytes(ring_bytes, hosts) if batch_bytes is None else batch_bytes
    assert sources is None or list(schedule.sources) == sources
    first = 1
    for batch in schedule.batches:
        mine = [step for step in steps if first <= step.seq <= batch.last_seq]
        assert len(mine) == 1 or sum(step.bucket.size_bytes for step in mine) <= limit
        assert all(step.free_after_seq < first for step in mine)
        wanted = {
            (schedule.sources[step.seq - 1], step.ring_offset_bytes + block)
            for step in mine
            for block in range(0, step.bucket.size_bytes, ALIGN_BYTES)
        }
        sent = [
            (region.source, region.offset_bytes + block)
            for region in batch.regions
            for block in range(0, region.size_bytes, ALIGN_BYTES)
        ]
        assert len(sent) == len(wanted)
        assert set(sent) == wanted
        first = batch.last_seq + 1
    assert first == len(steps) + 1


def test_small_buckets_of_one_source_are_one_broadcast():
    steps = [make_step(seq, 256, 256 * (seq - 1)) for seq in range(1, 9)]
    schedule = Schedule.of(steps, hosts=2, ring_bytes=1 << 20, batch_bytes=1024)
    assert [[(r.source, r.offset_bytes, r.size_bytes) for r in b.regions] for b in schedule.batches] == [
        [(0, 0, 1024)],
        [(1, 1024, 1024)],
    ]


def test_given_sources_may_be_a_function_and_are_checked():
    steps = [make_step(seq, 256, 256 * (seq - 1)) for seq in range(1, 5)]
    schedule = Schedule.of(steps, hosts=2, ring_bytes=1024, sources=lambda step: step.seq % 2, batch_bytes=1024)
    assert schedule.sources == (1, 0, 1, 0)
    assert len(schedule.batches[0].regions) == 4
    for wrong in ([0, 1, 2, 0], [0, 1]):
        with pytest.raises(ConfigError, match="expected 4 hosts from 0 to 1"):
            Schedule.of(steps, hosts=2, ring_bytes=1024, sources=wrong)


def test_schedules_differ_in_their_digests():
    steps = [make_step(seq, 256, 256 * (seq - 1)) for seq in range(1, 5)]
    variants = ({}, {"batch_bytes": 512}, {"sources": [0, 0, 0, 0]}, {"sources": [0, 0, 0, 1]})
    digests = {Schedule.of(steps, hosts=2, ring_bytes=1024, **options).digest for options in variants}
    assert len(digests) == len(variants)
    encoded = msgspec.msgpack.encode(Schedule.of(steps, hosts=2, ring_bytes=1024))
    assert msgspec.msgpack.decode(encoded, type=Schedule) == Schedule.of(steps, hosts=2, ring_bytes=1024)
