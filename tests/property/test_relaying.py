"""Several hosts in threads of one process: agents with real rings and real connections between them, ranks that read. Every rank
gets the checkpoint's bytes, and whatever goes wrong between hosts ends in a typed error in time."""

import contextlib
import socket
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import PeerLost, RendezvousTimeout, TransferTimeout, TransportError
from ckpt_core.fleet_plan import Holders, Hosts, several_hosts
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing, receive
from ckpt_core.polling import Poller
from ckpt_core.pool_file import stage_tensors
from ckpt_core.relaying import relay_all, slots_for
from ckpt_core.routing.columns import ints
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.topology import striped
from ckpt_core.source_share import as_here, only
from ckpt_core.staging import HostPool
from ckpt_core.transport import chain
from ckpt_core.transport.chain import Neighbours
from ckpt_core.transport.ipc import IpcRingReader, IpcRingWriter
from ckpt_core.wire import Links

DEADLINE_S = 20.0
SECRET = "5" * 32


class Update:
    """One update of ranks on several hosts; the first failure aborts all, as a controller would.

    `ports` may be changed between `open` and `run`: they are what agents are told of each other.
    """

    def __init__(self, tensors, layouts, host_of, hosts, directory, *, ring_bytes=4096, bucket_bytes=1024):
        self.index = stage_tensors(tensors, directory)
        self.manifest = Manifest.from_index(self.index)
        self.plan = several_hosts(
            self.manifest, layouts, host_of, hosts, ring_bytes=ring_bytes, bucket_bytes=bucket_bytes
        )
        self.layouts, self.host_of, self.hosts, self.directory = layouts, host_of, hosts, directory
        self.agents = [(host, agent) for host, count in enumerate(hosts.agents) for agent in range(count)]
        self.secrets = [SECRET for _ in self.agents]
        self.stats = {}
        self.errors = {}
        self.got = [{} for _ in host_of]
        self.aborted = threading.Event()

    @contextlib.contextmanager
    def open(self):
        with contextlib.ExitStack() as stack:
            self.pools, self.writers, self.neighbours = [], [], []
            for number, (host, agent) in enumerate(self.agents):
                pool = HostPool(CpuDevice())
                stack.callback(pool.close)
                pool.adopt(as_here(only(self.index, self.hosts.holders.names(self.manifest, host))))
                self.pools.append(pool)
                writer = IpcRingWriter(
                    owner=agent,
                    number=number,
                    receivers=len(self.host_of),
                    ring_bytes=self.plan.ring_bytes,
                    device=CpuDevice(),
                    directory=self.directory,
                )
                stack.callback(writer.close)
                writer.expect(self.plan.plans[host].receivers)
                self.writers.append(writer)
                self.neighbours.append(Neighbours("127.0.0.1"))
                stack.callback(self.neighbours[-1].close)
            self.ports = [
                [self.neighbours[peer].port for peer in self.relay(number).outlets]
                for number in range(len(self.agents))
            ]
            yield self

    def relay(self, number):
        host, agent = self.agents[number]
        return self.plan.relays[host][agent]

    def run(self):
        calls = {f"agent {number}": (self._agent, number) for number in range(len(self.agents))}
        calls |= {f"rank {rank}": (self._rank, rank) for rank in range(len(self.host_of))}
        threads = [threading.Thread(target=self._run, args=(who, *call), daemon=True) for who, call in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads), "a deadlock: not even the deadline ended it"
        return self

    def _run(self, who, call, number):
        try:
            call(number)
        except Exception as error:  # noqa: BLE001 shown by the test's own thread
            self.errors[who] = error
            self.aborted.set()

    def _poller(self):
        deadline = time.monotonic() + DEADLINE_S
        return Poller(check=self._check, deadline=deadline, expired=lambda what: TransferTimeout(f"waited for {what}"))

    def _check(self):
        if self.aborted.is_set():
            raise TransportError("aborted")

    def _agent(self, number):
        host, agent = self.agents[number]
        relay, pool, neighbours = self.relay(number), self.pools[number], self.neighbours[number]
        neighbours.connect(relay, Links(agent=number, secret=self.secrets[number], ports=tuple(self.ports[number])))
        inlets, outlets = neighbours.meet(relay, lambda: None)
        arriving = {arrival.seq for arrival in relay.arrivals}
        outgoing = Outgoing(
            self.plan.plans[host], agent, pool, self.manifest, is_source=lambda step: step.seq not in arriving
        )
        slots = slots_for(outgoing, relay, CpuDevice())
        try:
            self.stats[number] = relay_all(
                outgoing,
                relay,
                inlets=inlets,
                outlets=outlets,
                slots=slots,
                writer=self.writers[number],
                pool=pool,
                manifest=self.manifest,
                poller=self._poller(),
            )
            assert len(slots.free) >= min(relay.slots, len(relay.arrivals)), "all came back"
        finally:
            slots.close()

    def _rank(self, rank):
        host = self.host_of[rank]
        receiver = self.host_of[:rank].count(host)
        plan = self.plan.plans[host]
        readers = [
            IpcRingReader(self.writers[number].offer(), receiver=receiver, receivers=plan.receivers, device_index=0)
            for number, (its_host, _) in enumerate(self.agents)
            if its_host == host
        ]

        def consume(step):
            for piece in step.bucket.pieces:
                view = readers[step.owner].view(step.ring_offset_bytes + piece.offset_bytes, piece.size_bytes)
                self.got[rank].setdefault(piece.tensor, []).append((piece.box, view.numpy().copy()))

        try:
            receive(plan, receiver, readers=readers, consume=consume, poller=self._poller())
        finally:
            for reader in readers:
                reader.close()

    def assert_complete(self, tensors):
        """Every byte that a rank was to get is that of the checkpoint."""
        assert self.errors == {}
        for layout, got in zip(self.layouts, self.got, strict=True):
            for entry in layout.entries:
                tensor = tensors[entry.tensor]
                whole = Box.whole(tuple(tensor.shape))
                here = torch.zeros(tensor.shape, dtype=torch.bool)
                for box, data in got.get(self.manifest.index_of(entry.tensor), ()):
                    part = (box or whole).slices
                    assert data.tobytes() == raw(tensor[part])
                    here[part] = True
                assert bool(here[(entry.box or whole).slices].all())
        for number, stats in self.stats.items():
            relay, (host, agent) = self.relay(number), self.agents[number]
            sizes = {step.seq: step.bucket.size_bytes for step in self.plan.plans[host].steps if step.owner == agent}
            assert stats.sent_bytes == sum(sizes.values())
            assert stats.network_in_bytes == sum(sizes[arrival.seq] for arrival in relay.arrivals)
            leaves = [d.bucket.size_bytes if d.bucket else sizes[d.seq] for d in relay.departures]
            assert stats.network_out_bytes == sum(leaves)
        assert sum(stats.network_in_bytes for stats in self.stats.values()) == sum(self.plan.network_bytes)

    def first_errors(self):
        """By who, without those that were only told to end."""
        return {who: error for who, error in self.errors.items() if str(error) != "aborted"}


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def any_tensor(shape, dtype, seed):
    raw = np.random.default_rng(seed).integers(0, 100, shape)
    return torch.from_numpy(raw).to(dtype)


# -- whatever the hosts, the layouts and the holders -------------------------------------------------------------------
@st.composite
def slices_of(draw, tensors, names):
    """Rows, columns, anything inside, or all."""
    entries = []
    for name in names:
        shape, box = tuple(tensors[name].shape), None
        if draw(st.booleans()):
            start, size = [], []
            for extent in shape:
                first, end = sorted((draw(st.integers(0, extent)), draw(st.integers(0, extent))))
                start.append(first)
                size.append(end - first)
            box = Box(start=tuple(start), shape=tuple(size))
        entries.append(LayoutEntry(tensor=name, box=box, cut=draw(st.sampled_from([True, True, False]))))
    return Layout(entries=tuple(entries))


@st.composite
def cases(draw):
    tensors = {}
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.tuples(st.integers(0, 30), st.integers(1, 30)) | st.lists(st.integers(0, 6), max_size=3))
        dtype = draw(st.sampled_from((torch.uint8, torch.bfloat16, torch.float32)))
        tensors[f"m{number % 3}.t{number}"] = any_tensor(tuple(shape), dtype, number)
    hosts, ranks = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    wanted = st.lists(st.sampled_from(sorted(tensors)), min_size=1).flatmap(lambda names: slices_of(tensors, names))
    some = st.sets(st.integers(0, hosts - 1), min_size=1).map(sorted).map(tuple)
    sets = tuple(draw(st.lists(some, min_size=1, max_size=3)))
    of_tensor = ints([draw(st.integers(0, len(sets) - 1)) for _ in tensors])
    agents = tuple(draw(st.integers(1, 2)) for _ in range(hosts))
    return {
        "tensors": tensors,
        "layouts": [draw(wanted) for _ in range(ranks)],
        "host_of": [draw(st.integers(0, hosts - 1)) for _ in range(ranks)],
        "hosts": Hosts(agents=agents, nic_gb_s=(0.0,) * hosts, holders=Holders(sets=sets, of_tensor=of_tensor)),
        "ring_bytes": draw(st.integers(256, 6000)),
        "bucket_bytes": draw(st.sampled_from([256, 1024])),
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_every_rank_of_every_host_gets_its_bytes(case):
    with tempfile.TemporaryDirectory() as directory, Update(directory=Path(directory), **case).open() as update:
        update.run().assert_complete(case["tensors"])


# -- engines over two hosts, three times -------------------------------------------------------------------------------
def columns_and_rows(tensors, ranks):
    """Rank r of 4 has a quarter of the columns of some tensors and a quarter of the rows of the others."""
    layouts = []
    for rank in range(ranks):
        part = rank % 4
        entries = []
        for name, tensor in sorted(tensors.items()):
            rows, columns = tensor.shape
            by_column = name.endswith("c")
            start = (0, columns * part // 4) if by_column else (rows * part // 4, 0)
            shape = (rows, columns // 4) if by_column else (rows // 4, columns)
            entries.append(LayoutEntry(tensor=name, box=Box(start=start, shape=shape), cut=True))
        layouts.append(Layout(entries=tuple(entries)))
    return layouts


TENSORS = {f"l{n}.{kind}": any_tensor((32, 64), torch.bfloat16, n) for n in range(6) for kind in "cr"}


@pytest.fixture
def update_of(tmp_path):
    """Makes an update of 4 hosts with 2 ranks and 2 agents each, open until the test is over."""
    with contextlib.ExitStack() as stack:

        def update_of(holders="striped", **sizes):
            with tempfile.TemporaryDirectory() as unused:
                manifest = Manifest.from_index(stage_tensors(TENSORS, Path(unused)))
            dealt = striped(manifest, natural_order(manifest), 4, stripe_bytes=4096)
            held = {
                "striped": Holders(sets=((0,), (1,), (2,), (3,)), of_tensor=dealt),
                "first": Holders(sets=((0,),), of_tensor=ints([0] * len(TENSORS))),
            }[holders]
            hosts = Hosts(agents=(2,) * 4, nic_gb_s=(1.0,) * 4, holders=held)
            update = Update(TENSORS, columns_and_rows(TENSORS, 8), [r // 2 for r in range(8)], hosts, tmp_path, **sizes)
            return stack.enter_context(update.open())

        yield update_of


@pytest.mark.parametrize("ring_bytes", [1024, 1 << 16])
@pytest.mark.parametrize("holders", ["striped", "first"])
def test_strided_slices_arrive_over_chains(update_of, holders, ring_bytes):
    update = update_of(holders, ring_bytes=ring_bytes)
    assert any(d.seq for number in range(8) for d in update.relay(number).departures), "something is passed on"
    update.run().assert_complete(TENSORS)


def test_what_is_larger_than_a_socket_takes_at_once_arrives(tmp_path):
    tensors = {"t": any_tensor((3000, 4000), torch.uint8, 1), "u": any_tensor((1, 7), torch.uint8, 2)}
    holders = Holders(sets=((0,),), of_tensor=ints([0, 0]))
    hosts = Hosts(agents=(1, 1, 1), nic_gb_s=(0.0,) * 3, holders=holders)
    made = stage_tensors(tensors, tmp_path)
    layouts = [whole_layout(Manifest.from_index(made))] * 3
    update = Update(tensors, layouts, [0, 1, 2], hosts, tmp_path, ring_bytes=1 << 20, bucket_bytes=1 << 19)
    with update.open():
        update.run().assert_complete(tensors)
    assert update.plan.network_bytes[0] == 0
    assert all(arrived >= 12_000_007 for arrived in update.plan.network_bytes[1:])


# -- what goes wrong between hosts -------------------------------------------------------------------------------------
def between(update, number, outlet, disturb, *, most_bytes=None):
    """A proxy on the way of an agent to one of its outlets: `disturb` gets each chunk and its place in the stream.

    With `most_bytes` it passes on so many, and then hangs up.
    """
    host, _, port = update.ports[number][outlet].rpartition(":")
    listening = socket.create_server(("127.0.0.1", 0))

    def carry():
        with listening, contextlib.suppress(OSError):
            before, _ = listening.accept()
            with before, socket.create_connection((host, int(port))) as after:
                place = 0
                while data := before.recv(65536):
                    changed = disturb(data, place)
                    place += len(data)
                    if most_bytes is not None and place >= most_bytes:
                        after.sendall(changed[: len(changed) - (place - most_bytes)])
                        return
                    after.sendall(changed)

    threading.Thread(target=carry, daemon=True).start()
    update.ports[number][outlet] = f"127.0.0.1:{listening.getsockname()[1]}"
    return update.relay(number).outlets[outlet]


def sender_of(update):
    return next(number for number in range(len(update.agents)) if update.relay(number).outlets)


HELLO_BYTES, HEAD_BYTES = 36, 24


def flipped(place_of_flip):
    def disturb(data, place):
        at = place_of_flip - place
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data

    return disturb


@pytest.mark.parametrize("in_bucket", [0, 255])
def test_a_byte_that_changes_on_the_way_is_noticed_by_who_takes_it(update_of, in_bucket):
    update = update_of()
    sender = sender_of(update)
    peer = between(update, sender, 0, flipped(HELLO_BYTES + HEAD_BYTES + in_bucket))
    update.run()
    error = update.first_errors()[f"agent {peer}"]
    assert type(error) is TransportError
    assert f"a bucket from agent {sender} arrived with digest" in str(error)


@pytest.mark.parametrize(("place", "says"), [(0, "sent bucket"), (8, "arrived with digest"), (16, "sent bucket")])
def test_a_head_that_changes_on_the_way_is_noticed(update_of, place, says):
    update = update_of()
    peer = between(update, sender_of(update), 0, flipped(HELLO_BYTES + place))
    update.run()
    error = update.first_errors()[f"agent {peer}"]
    assert type(error) is TransportError
    assert says in str(error)


def test_a_neighbour_that_hangs_up_is_lost(update_of):
    update = update_of("first")
    sender = sender_of(update)
    peer = between(update, sender, 0, lambda data, _place: data, most_bytes=HELLO_BYTES)
    update.run()
    errors = update.first_errors()
    assert errors  # of either end, whoever noticed first, or both
    assert set(errors) <= {f"agent {sender}", f"agent {peer}"}
    for who, error in errors.items():
        assert isinstance(error, PeerLost)
        other = peer if who == f"agent {sender}" else sender
        assert f"the connection to agent {other} broke" in str(error)


def test_who_has_the_wrong_secret_is_turned_away(update_of, monkeypatch):
    monkeypatch.setattr(chain, "_CONNECT_S", 0.5)
    update = update_of("first")
    sender = sender_of(update)
    update.secrets[sender] = "6" * 32
    update.run()
    for peer in update.relay(sender).outlets:
        error = update.first_errors()[f"agent {peer}"]
        assert isinstance(error, RendezvousTimeout)
        assert f"agents [{sender}] did not connect" in str(error)
        assert peer not in update.stats
