"""Laws of simulations: never faster than the lower bound, never slower with a faster lane."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.cost import LaneSpeeds, Road, alternatives, predict, routed_alternatives
from ckpt_core.dtypes import DType
from ckpt_core.errors import ConfigError
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan import make_plan
from ckpt_core.routing.columns import ints
from ckpt_core.routing.needs import ClassNeeds
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.routed import make_routed_plan
from ckpt_core.routing.topology import striped, uniform
from ckpt_core.simulate import FleetRates, HostRates, simulate_plan, simulate_routed

MIB = 1 << 20
rates = st.floats(0.1, 100)


def model(tensors, rows=64):
    metas = [TensorMeta(name=f"layers.{n:03}.w", dtype=DType.U8, shape=(rows, 4096)) for n in range(tensors)]
    return Manifest(tensors=tuple(metas))


def cut(manifest, rank, ranks):
    entries = []
    for meta in manifest.tensors:
        rows = meta.shape[0] // ranks
        box = Box(start=(rank * rows, 0), shape=(rows, 4096))
        entries.append(LayoutEntry(tensor=meta.name, box=box, cut=True))
    return Layout(entries=tuple(entries))


def cluster(draw_hosts, holders, tensors=60, **speeds):
    """Two ranks a host, four classes: hosts of two kinds."""
    manifest = model(tensors)
    order = natural_order(manifest)
    needs = [ClassNeeds.of(cut(manifest, rank, 4), manifest) for rank in range(4)]
    topology = uniform(
        ranks=2 * draw_hosts,
        ranks_per_host=2,
        classes=4,
        holder_sets=[(host,) for host in range(holders)],
        holder_of=striped(manifest, order, holders, stripe_bytes=MIB),
        nics=2,
        **speeds,
    )
    return manifest, make_routed_plan(manifest, needs, topology, bucket_bytes=MIB // 4)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.data())
@settings(deadline=None)
def test_one_host_is_bound_by_its_lanes_and_never_slower_when_they_are_faster(agents, ranks, ring, data):
    manifest = model(20, rows=60)
    layouts = [cut(manifest, rank, ranks) for rank in range(ranks)]
    plan = make_plan(manifest, layouts, agents=agents, ring_bytes=ring * MIB // 4, bucket_bytes=MIB // 4)
    slow = HostRates(fill_gb_s=tuple(data.draw(rates) for _ in range(agents)), pull_gb_s=data.draw(rates))
    played = simulate_plan(plan, slow)
    bounds = [size / rate / 1e9 for size, rate in zip(plan.bytes_by_owner, slow.fill_gb_s, strict=True)]
    bounds += [size / slow.pull_gb_s / 1e9 for size in plan.bytes_needed_by_receiver]
    assert played.seconds >= max(bounds) * (1 - 1e-9)
    assert played.seconds >= max(played.busy_s.values()) * (1 - 1e-9)
    faster = data.draw(st.sampled_from([*range(agents), "pull"]))
    if faster == "pull":
        quick = replace(slow, pull_gb_s=slow.pull_gb_s * 2)
    else:
        fills = [rate * (2 if agent == faster else 1) for agent, rate in enumerate(slow.fill_gb_s)]
        quick = replace(slow, fill_gb_s=tuple(fills))
    assert simulate_plan(plan, quick).seconds <= played.seconds * (1 + 1e-9)


@given(st.integers(1, 14), st.integers(1, 14), rates, rates, st.booleans())
@settings(deadline=None, max_examples=40)
def test_many_hosts_take_no_less_than_the_bound_and_no_more_with_faster_lanes(hosts, holders, nic, pcie, nic_faster):
    holders = min(hosts, holders)
    _, plan = cluster(hosts, holders, nic_gb_s=nic, pcie_gb_s=pcie)
    played = simulate_routed(plan, FleetRates(ring_buckets=64))
    assert played.seconds >= max(plan.demand.lower_bound_s.values()) * (1 - 1e-9)
    assert played.seconds >= max(plan.busiest_s().values()) * (1 - 1e-9)
    _, quick = cluster(hosts, holders, nic_gb_s=nic * (1 + nic_faster), pcie_gb_s=pcie * (2 - nic_faster))
    assert simulate_routed(quick, FleetRates(ring_buckets=64)).seconds <= played.seconds * (1 + 1e-9)


def test_a_pipeline_of_one_agent_takes_what_paper_says():
    manifest = model(8, rows=64)  # 256 KiB each
    plan = make_plan(manifest, [whole_layout(manifest)], agents=1, ring_bytes=MIB // 2, bucket_bytes=MIB // 4)
    exact = HostRates(fill_gb_s=(1.0,), pull_gb_s=2.0, piece_s=0.0, bucket_s=0.0, handover_s=0.0)
    bucket_s = 262144 / 1e9
    assert simulate_plan(plan, exact).seconds == pytest.approx(8 * bucket_s + bucket_s / 2)
    alone = make_plan(manifest, [whole_layout(manifest)], agents=1, ring_bytes=MIB // 4, bucket_bytes=MIB // 4)
    assert simulate_plan(alone, exact).seconds == pytest.approx(8 * 1.5 * bucket_s), "one slot: no overlap"


def test_a_chain_takes_one_hop_more_per_host():
    def chain(hosts):
        manifest = model(1)
        needs = [ClassNeeds.of(whole_layout(manifest), manifest)]
        topology = uniform(
            ranks=hosts, ranks_per_host=1, classes=1, holder_sets=[(hosts,)], holder_of=ints([0]),
            nics=1, nic_gb_s=1.0, pcie_gb_s=8.0, more_hosts=1,
        )  # fmt: skip
        plan = make_routed_plan(manifest, needs, topology, bucket_bytes=4 * MIB)
        return simulate_routed(plan, FleetRates(pull_gb_s=1e6, chunk_bytes=1024, hop_s=1e-3)).seconds

    step = 1e-3 + 1024 / 1e9
    assert chain(1) == pytest.approx(262144 / 1e9, rel=1e-3)
    assert chain(12) - chain(11) == pytest.approx(step, rel=1e-3)


# -- the cost model ------------------------------------------------------------------------------------------------
def test_one_host_pulls_as_the_plan_does():
    manifest = model(200)
    layouts = [cut(manifest, rank, 2) for rank in range(2)]
    plan = make_plan(manifest, layouts, agents=2, ring_bytes=16 * MIB, bucket_bytes=4 * MIB)
    ways = alternatives(plan, LaneSpeeds(pcie_gb_s=10))
    assert ways[0].road is Road.PULL
    assert ways[0].seconds == predict(plan, LaneSpeeds(pcie_gb_s=10)).seconds
    assert ways[0].bytes_by_lane["PCIe, all"] == sum(plan.bytes_by_owner)
    by_road = {way.road: way for way in ways}
    assert by_road[Road.BROADCAST].bytes_by_lane["peer, into a rank"] == plan.size_bytes // 2
    whole = make_plan(manifest, [whole_layout(manifest)] * 2, agents=2, ring_bytes=16 * MIB, bucket_bytes=4 * MIB)
    by_road = {way.road: way for way in alternatives(whole, LaneSpeeds(pcie_gb_s=10))}
    assert by_road[Road.P2P].seconds == pytest.approx(2 * by_road[Road.PULL].seconds), "each rank copies all"


def test_between_hosts_routing_beats_broadcast_by_what_hosts_do_not_need():
    manifest, plan = cluster(8, 8, tensors=400, nic_gb_s=1.0, pcie_gb_s=55.0)
    ways = {way.road: way for way in routed_alternatives(plan, manifest.size_bytes, LaneSpeeds(group_s=0.0))}
    assert ways[Road.PULL].seconds is None
    assert "not possible" in ways[Road.PULL].why
    assert ways[Road.BROADCAST].lower_bound_s == pytest.approx(2 * ways[Road.ROUTED].lower_bound_s, rel=0.2)
    assert ways[Road.ROUTED].lower_bound_s <= ways[Road.P2P].seconds * 1.01
    assert all(way.seconds is None or way.seconds >= way.lower_bound_s for way in ways.values())


def test_few_holders_make_p2p_slow_and_one_joiner_makes_it_best():
    manifest, plan = cluster(8, 1, tensors=200, nic_gb_s=1.0)
    ways = {way.road: way for way in routed_alternatives(plan, manifest.size_bytes, LaneSpeeds(group_s=0.0))}
    assert ways[Road.P2P].seconds > 2 * ways[Road.ROUTED].seconds
    _, joiner = cluster(2, 1, tensors=200, nic_gb_s=1.0)
    assert routed_alternatives(joiner, manifest.size_bytes, LaneSpeeds())[0].road is Road.P2P


def test_a_routed_plan_is_predicted():
    _, plan = cluster(4, 4, tensors=200)
    predicted = predict(plan)
    assert predicted.seconds >= predicted.lower_bound_s == max(plan.demand.lower_bound_s.values())
    assert predicted.bottleneck in predicted.busy_s


def test_lane_speeds_are_read_or_refused():
    speeds = LaneSpeeds().changed(["pcie=20", "nic=12.5", "nics=2", "peer=100", "group=0.5"])
    assert speeds == LaneSpeeds(pcie_gb_s=20, nic_gb_s=12.5, nics=2, peer_gb_s=100, group_s=0.5)
    for wrong in ("warp=1", "pcie", "pcie=fast", "pcie=0", "nic=inf"):
        with pytest.raises(ConfigError, match="expected one of pcie"):
            LaneSpeeds().changed([wrong])


def test_rings_that_hold_too_little_are_told():
    _, plan = cluster(14, 14)
    assert simulate_routed(plan).ring_buckets >= 2
    assert np.isfinite(simulate_routed(plan).seconds)
