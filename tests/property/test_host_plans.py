"""Laws of plans of several hosts: each host's plan is safe and whole, what enters a host is what it needs and lacks, what one
agent sends another takes, and the slots that are stated are enough for everybody to come to the end."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ckpt_core.bucket import ALIGN_BYTES
from ckpt_core.dtypes import DType
from ckpt_core.fleet_plan import Holders, Hosts, several_hosts
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import check_plan
from ckpt_core.relay import FROM_POOL
from ckpt_core.routing.columns import ints
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.topology import striped
from ckpt_core.wanted import Wanted

DTYPES = st.sampled_from([DType.U8, DType.BF16, DType.F64])
SLOW = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# -- checkpoints and what ranks need of them ---------------------------------------------------------------------------
@st.composite
def manifests(draw):
    shapes = st.tuples(st.integers(0, 40), st.integers(1, 40)) | st.lists(st.integers(0, 9), max_size=3).map(tuple)
    names = sorted(f"{'ab'[n % 2]}.{n // 8}.{'wxyz'[n // 2 % 4]}" for n in range(draw(st.integers(0, 16))))
    return Manifest(tensors=tuple(TensorMeta(name=name, dtype=draw(DTYPES), shape=draw(shapes)) for name in names))


@st.composite
def boxes_in(draw, shape):
    start = [draw(st.integers(0, extent)) for extent in shape]
    size = [draw(st.integers(0, extent - first)) for first, extent in zip(start, shape, strict=True)]
    return Box(start=tuple(start), shape=tuple(size))


@st.composite
def any_layouts(draw, manifest, ranks, cut):
    """Some classes of ranks, each with any slices, as they would be of engines of different kinds."""
    classes = []
    for _ in range(draw(st.integers(1, 3))):
        wanted = draw(st.lists(st.sampled_from(manifest.tensors), max_size=8)) if manifest.tensors else []
        entries = [
            LayoutEntry(tensor=meta.name, box=draw(st.none() | boxes_in(meta.shape)), cut=draw(cut)) for meta in wanted
        ]
        classes.append(Layout(entries=tuple(entries)))
    return [draw(st.sampled_from(classes)) for _ in range(ranks)]


def tensor_parallel(manifest, ranks, ways, *, rows, cut):
    """As engines cut: every `ways`-th rank has the same rows (or columns), and all have what cannot be cut so."""
    layouts = []
    for rank in range(ranks):
        entries = []
        for meta in manifest.tensors:
            dim = 0 if rows(meta.name) else len(meta.shape) - 1
            extent = meta.shape[dim] if meta.shape else 0
            first, end = (extent * (rank % ways + more) // ways for more in (0, 1))
            box = None
            if first < end:
                start, shape = [0] * len(meta.shape), list(meta.shape)
                start[dim], shape[dim] = first, end - first
                box = Box(start=tuple(start), shape=tuple(shape))
            entries.append(LayoutEntry(tensor=meta.name, box=box, cut=cut))
        layouts.append(Layout(entries=tuple(entries)))
    return layouts


@st.composite
def holders_of(draw, manifest, hosts):
    """Who reads: as configurations have it, and any way else."""
    everybody = tuple((host,) for host in range(hosts))
    count = len(manifest.tensors)
    kind = draw(st.sampled_from(["striped", "one", "everybody", "any"]))
    event(f"held by: {kind}")
    if kind == "striped":
        stripe_bytes = draw(st.sampled_from([512, 4096, 1 << 40]))
        dealt = striped(manifest, natural_order(manifest), hosts, stripe_bytes=stripe_bytes)
        return Holders(sets=everybody, of_tensor=dealt)
    if kind == "one":
        return Holders(sets=((draw(st.integers(0, hosts - 1)),),), of_tensor=ints([0] * count))
    if kind == "everybody":
        return Holders(sets=(tuple(range(hosts)),), of_tensor=ints([0] * count))
    some = st.sets(st.integers(0, hosts - 1), min_size=1).map(sorted).map(tuple)
    sets = tuple(draw(st.lists(some, min_size=1, max_size=3)))
    return Holders(sets=sets, of_tensor=ints([draw(st.integers(0, len(sets) - 1)) for _ in range(count)]))


class Problem:
    """A plan, and what it was made for."""

    def __init__(self, manifest, layouts, host_of, hosts, **sizes):
        self.manifest, self.layouts, self.host_of, self.hosts = manifest, layouts, host_of, hosts
        self.plan = several_hosts(manifest, layouts, host_of, hosts, **sizes)
        numbers = [(host, agent) for host, count in enumerate(hosts.agents) for agent in range(count)]
        self.agents = range(len(numbers))
        self.host_of_agent = [host for host, _ in numbers]
        self.relays = [self.plan.relays[host][agent] for host, agent in numbers]
        self.steps = [
            {step.seq: step for step in self.plan.plans[host].steps if step.owner == agent} for host, agent in numbers
        ]

    def ranks_of(self, host):
        return [rank for rank, its in enumerate(self.host_of) if its == host]

    def __repr__(self):
        return f"Problem({self.manifest}, {self.layouts}, {self.host_of}, {self.hosts})"


@st.composite
def problems(draw, cut=st.booleans()):  # noqa: B008 a strategy never changes
    manifest = draw(manifests())
    hosts, ranks = draw(st.integers(2, 5) | st.just(1)), draw(st.integers(1, 10))
    host_of = [draw(st.integers(0, hosts - 1)) for _ in range(ranks)]  # a host may have no rank at all
    if draw(st.booleans()):
        layouts = draw(any_layouts(manifest, ranks, cut))
    else:
        ways, by_rows = draw(st.integers(1, ranks)), draw(st.sampled_from(["", "wx", "wxyz"]))
        layouts = tensor_parallel(manifest, ranks, ways, rows=lambda name: name[-1] in by_rows, cut=draw(cut))
    members = Hosts(
        agents=tuple(draw(st.integers(1, 3)) for _ in range(hosts)),
        nic_gb_s=tuple(draw(st.sampled_from([0.0, 25.0, 50.0])) for _ in range(hosts)),
        holders=draw(holders_of(manifest, hosts)),
    )
    sizes = {
        "ring_bytes": draw(st.integers(256, 6000)),
        "bucket_bytes": draw(st.sampled_from([ALIGN_BYTES, 1024, 4096])),
    }
    return Problem(manifest, layouts, host_of, members, **sizes)


def count(manifest, parts):
    """How often each element is in these (tensor, box or None)."""
    counts = [np.zeros(meta.shape, dtype=int) for meta in manifest.tensors]
    for tensor, box in parts:
        counts[tensor][... if box is None else box.slices] += 1
    return counts


def parts_of(buckets):
    return [(piece.tensor, piece.box) for bucket in buckets for piece in bucket.pieces]


# -- the laws ----------------------------------------------------------------------------------------------------------
@SLOW
@given(problems())
def test_the_plan_of_each_host_is_safe_and_brings_its_ranks_all_they_want(problem):
    for host, plan in enumerate(problem.plan.plans):
        ranks = problem.ranks_of(host)
        wanted = {receiver: Wanted(problem.manifest, problem.layouts[rank]) for receiver, rank in enumerate(ranks)}
        assert (plan.receivers, plan.agents) == (len(ranks), problem.hosts.agents[host])
        check_plan(plan, problem.manifest, wanted)
        if not ranks:
            assert plan.steps == ()


@SLOW
@given(problems(cut=st.just(True)))
def test_what_enters_a_host_is_what_its_ranks_need_and_it_does_not_hold(problem):
    manifest, holders = problem.manifest, problem.hosts.holders
    for host in range(len(problem.hosts.agents)):
        entries = [entry for rank in problem.ranks_of(host) for entry in problem.layouts[rank].entries]
        needed = count(manifest, [(manifest.index_of(entry.tensor), entry.box) for entry in entries])
        mine = [agent for agent in problem.agents if problem.host_of_agent[agent] == host]
        buckets = [problem.steps[agent][a.seq].bucket for agent in mine for a in problem.relays[agent].arrivals]
        arrived = count(manifest, parts_of(buckets))
        held = holders.names(manifest, host)
        for meta, need, arrival in zip(manifest.tensors, needed, arrived, strict=True):
            lacks = (need > 0) & (meta.name not in held)
            assert (arrival == lacks).all(), (host, meta.name)
        assert problem.plan.network_bytes[host] == sum(bucket.size_bytes for bucket in buckets)
        padding = ALIGN_BYTES * sum(len(bucket.pieces) for bucket in buckets)
        exact = sum(piece.size_bytes for bucket in buckets for piece in bucket.pieces)
        assert exact <= problem.plan.network_bytes[host] <= exact + padding


@SLOW
@given(problems())
def test_what_fills_a_ring_or_leaves_comes_from_the_pool_of_its_host_or_came_in(problem):
    holders = problem.hosts.holders
    for agent in problem.agents:
        host, relay = problem.host_of_agent[agent], problem.relays[agent]
        held = set(holders.names(problem.manifest, host))
        arriving = [arrival.seq for arrival in relay.arrivals]
        assert arriving == sorted(set(arriving))
        from_pool = [step.bucket for seq, step in problem.steps[agent].items() if seq not in arriving]
        from_pool += [departure.bucket for departure in relay.departures if departure.bucket is not None]
        for tensor, _ in parts_of(from_pool):
            assert problem.manifest.tensors[tensor].name in held
        passed_on = [departure.seq for departure in relay.departures if departure.seq != FROM_POOL]
        assert set(passed_on) <= set(arriving)
        assert max(Counter(passed_on).values(), default=1) == 1
        assert all((departure.seq == FROM_POOL) == (departure.bucket is not None) for departure in relay.departures)


def content(bucket):
    return bucket.size_bytes, bucket.pieces


@SLOW
@given(problems())
def test_what_one_agent_sends_another_takes_in_the_same_order(problem):
    for agent in problem.agents:
        relay = problem.relays[agent]
        assert len(set(relay.outlets)) == len(relay.outlets)
        assert len(set(relay.inlets)) == len(relay.inlets)
        for outlet, peer in enumerate(relay.outlets):
            assert problem.host_of_agent[peer] != problem.host_of_agent[agent]
            sent = [
                content(departure.bucket or problem.steps[agent][departure.seq].bucket)
                for departure in relay.departures
                if departure.outlet == outlet
            ]
            theirs = problem.relays[peer]
            inlet = theirs.inlets.index(agent)
            taken = [
                content(problem.steps[peer][arrival.seq].bucket)
                for arrival in theirs.arrivals
                if arrival.inlet == inlet
            ]
            assert sent == taken != []
        for peer in relay.inlets:
            assert agent in problem.relays[peer].outlets


# -- nobody waits for ever ---------------------------------------------------------------------------------------------
class Play:
    """All agents and ranks, without time: whatever can happen does, until nothing can.

    Nothing that happens takes away what else could, so that one order tells of all. Connections hold nothing: a bucket
    leaves when its place at the other end is free.
    """

    def __init__(self, problem, slots):
        self.problem = problem
        agents = problem.agents
        self.free = list(slots)
        self.granted = [0 for _ in agents]
        self.waiting = [[[] for _ in relay.inlets] for relay in problem.relays]  # places, by inlet
        self.there = [set() for _ in agents]
        self.uses = [Counter(arrival.seq for arrival in relay.arrivals) for relay in problem.relays]
        self.leaving = [[[] for _ in relay.outlets] for relay in problem.relays]
        for agent, relay in enumerate(problem.relays):
            for departure in relay.departures:
                self.leaving[agent][departure.outlet].append(departure)
                if departure.seq != FROM_POOL:
                    self.uses[agent][departure.seq] += 1
        self.arriving = [set(uses) for uses in self.uses]
        self.filled = [0 for _ in agents]  # which is what is published
        self.at = [0 for _ in problem.host_of]  # next step of each rank
        self.done = [Counter() for _ in problem.host_of]  # by owner
        self.first_agent = [sum(problem.hosts.agents[:host]) for host in range(len(problem.hosts.agents))]

    def run(self):
        """Whether all came to their end."""
        parts = (self.grant, self.carry, self.fill)
        while any([part(agent) for agent in self.problem.agents for part in parts] + [*map(self.read, self.ranks)]):
            pass
        return (
            not any(departures for outlets in self.leaving for departures in outlets)
            and all(len(steps) == self.filled[agent] for agent, steps in enumerate(self.problem.steps))
            and all(self.at[rank] == len(self.problem.plan.plan_of(rank).steps) for rank in self.ranks)
            and not any(self.there)
        )

    @property
    def ranks(self):
        return range(len(self.problem.host_of))

    def grant(self, agent):
        arrivals = self.problem.relays[agent].arrivals[self.granted[agent] :][: self.free[agent]]
        for arrival in arrivals:
            self.waiting[agent][arrival.inlet].append(arrival.seq)
        self.granted[agent] += len(arrivals)
        self.free[agent] -= len(arrivals)
        return bool(arrivals)

    def carry(self, agent):
        moved = False
        for outlet, departures in enumerate(self.leaving[agent]):
            peer = self.problem.relays[agent].outlets[outlet]
            places = self.waiting[peer][self.problem.relays[peer].inlets.index(agent)]
            while departures and places and (departures[0].bucket or departures[0].seq in self.there[agent]):
                self.there[peer].add(places.pop(0))
                if (seq := departures.pop(0).seq) != FROM_POOL:
                    self.used(agent, seq)
                moved = True
        return moved

    def fill(self, agent):
        seq = self.filled[agent] + 1
        step = self.problem.steps[agent].get(seq)
        readers = self.problem.ranks_of(self.problem.host_of_agent[agent])
        if step is None or any(self.done[rank][step.owner] < step.free_after_seq for rank in readers):
            return False
        if seq in self.arriving[agent]:
            if seq not in self.there[agent]:
                return False
            self.used(agent, seq)
        self.filled[agent] = seq
        return True

    def used(self, agent, seq):
        self.uses[agent][seq] -= 1
        if not self.uses[agent][seq]:
            self.there[agent].remove(seq)
            self.free[agent] += 1

    def read(self, rank):
        steps, host = self.problem.plan.plan_of(rank).steps, self.problem.host_of[rank]
        receiver, before = self.problem.host_of[:rank].count(host), self.at[rank]
        while self.at[rank] < len(steps):
            step = steps[self.at[rank]]
            if receiver in step.receivers and self.filled[self.first_agent[host] + step.owner] < step.seq:
                break
            self.done[rank][step.owner] = step.seq
            self.at[rank] += 1
        return self.at[rank] > before


@settings(SLOW, max_examples=250)
@given(problems())
def test_the_stated_slots_are_enough_and_nobody_waits_for_ever(problem):
    slots = [relay.slots for relay in problem.relays]
    event(f"most slots: {max(slots)}")
    assert all(0 <= relay.slots <= len(relay.arrivals) for relay in problem.relays)
    assert Play(problem, slots).run()
    assert Play(problem, [2 * count + 1 for count in slots]).run()


def cluster(holders, *, hosts=6, more=0, agents=2, layers=24, ring_bytes=1 << 16):
    """Ranks of two hosts make an engine, and there are as many engines as fit: what a host needs three do."""
    metas = [TensorMeta(name=f"l.{n:02}.{w}", dtype=DType.BF16, shape=(64, 96)) for n in range(layers) for w in "wy"]
    metas += [TensorMeta(name=f"l.{n:02}.norm", dtype=DType.BF16, shape=(512,)) for n in range(layers)]
    manifest = Manifest(tensors=tuple(sorted(metas, key=lambda meta: meta.name)))
    host_of = [rank // 4 for rank in range(4 * hosts)]
    layouts = tensor_parallel(manifest, len(host_of), 8, rows=lambda name: name.endswith("w"), cut=True)
    everybody, count = tuple(range(hosts + more)), len(manifest.tensors)
    held = {
        "striped": Holders(
            sets=tuple((host,) for host in everybody),
            of_tensor=striped(manifest, natural_order(manifest), len(everybody), stripe_bytes=1 << 14),
        ),
        "last": Holders(sets=((everybody[-1],),), of_tensor=ints([0] * count)),
        "everybody": Holders(sets=(everybody,), of_tensor=ints([0] * count)),
    }[holders]
    members = Hosts(agents=(agents,) * len(everybody), nic_gb_s=(50.0,) * len(everybody), holders=held)
    return Problem(manifest, layouts, host_of, members, ring_bytes=ring_bytes, bucket_bytes=1 << 14)


@pytest.mark.parametrize("ring_bytes", [256, 1 << 16])
@pytest.mark.parametrize(("holders", "more"), [("striped", 0), ("last", 0), ("last", 1), ("everybody", 0)])
def test_a_cluster_comes_to_its_end_with_the_stated_slots(holders, more, ring_bytes):
    problem = cluster(holders, more=more, ring_bytes=ring_bytes)
    slots = [relay.slots for relay in problem.relays]
    assert any(slots) == (holders != "everybody")
    assert Play(problem, slots).run()


def test_without_slots_a_cluster_stands_still():
    problem = cluster("striped")
    assert not Play(problem, [0 for _ in problem.relays]).run()


def test_a_trainer_sends_bytes_once_that_three_hosts_need():
    problem = cluster("last", more=1)
    departures = [departure for relay in problem.relays for departure in relay.departures if departure.bucket]
    sent_bytes = sum(departure.bucket.size_bytes for departure in departures)
    trainer = [agent for agent in problem.agents if problem.host_of_agent[agent] == 6]
    assert len(departures) == sum(len(problem.relays[agent].departures) for agent in trainer)
    assert problem.plan.network_bytes[6] == 0
    assert 0 < 3 * sent_bytes <= sum(problem.plan.network_bytes)
