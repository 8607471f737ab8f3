"""Relays as flows: never faster than the busiest NIC allows, near to it where nothing else is in the way, and monotonic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.dtypes import DType
from ckpt_core.fleet_plan import Holders, Hosts, several_hosts
from ckpt_core.flows import play, predict_fleet
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.topology import striped

GB = 1e9
SIDE = 256


def manifest_of(tensors):
    metas = [TensorMeta(name=f"l.{number:03d}.w", dtype=DType.BF16, shape=(SIDE, SIDE)) for number in range(tensors)]
    return Manifest(tensors=tuple(metas))


def plan_of(tensors, hosts, tp, rates):
    """Two ranks a host; each rank takes its rows of every tensor; every host reads a stripe."""
    manifest = manifest_of(tensors)
    rows = SIDE // tp
    layouts = [
        Layout(
            entries=tuple(
                LayoutEntry(tensor=meta.name, box=Box(start=(rows * (rank % tp), 0), shape=(rows, SIDE)), cut=True)
                for meta in manifest.tensors
            )
        )
        for rank in range(2 * hosts)
    ]
    everybody = tuple((host,) for host in range(hosts))
    holders = Holders(
        sets=everybody, of_tensor=striped(manifest, natural_order(manifest), hosts, stripe_bytes=SIDE * SIDE * 2)
    )
    members = Hosts(agents=(2,) * hosts, nic_gb_s=tuple(rates), holders=holders)
    places = [rank // 2 for rank in range(2 * hosts)]
    return several_hosts(manifest, layouts, places, members, ring_bytes=1 << 22, bucket_bytes=1 << 16)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 24), st.integers(2, 4), st.sampled_from([2, 4]), st.data())
def test_no_nic_carries_more_than_it_can(tensors, hosts, tp, data):
    rates = [data.draw(st.sampled_from([0.01, 0.02, 0.05])) for _ in range(hosts)]
    plan = plan_of(tensors, hosts, tp, rates)
    seconds = play(plan)
    bound = max(size / (rate * GB) for size, rate in zip(plan.network_bytes, rates, strict=True))
    assert seconds >= bound * 0.999
    assert predict_fleet(plan).seconds >= seconds


@settings(deadline=None, max_examples=20)
@given(st.integers(4, 16), st.integers(2, 4))
def test_twice_as_fast_networks_take_half_the_time_but_for_handing_over(tensors, hosts):
    slow = play(plan_of(tensors, hosts, 2, [0.01] * hosts))
    fast = play(plan_of(tensors, hosts, 2, [0.02] * hosts))
    assert slow / 2 * 0.95 <= fast <= slow  # another order of arrivals may be a little better


def test_even_hosts_come_near_to_what_their_nics_carry():
    plan = plan_of(64, 4, 4, [0.1] * 4)
    assert play(plan) == pytest.approx(max(plan.network_bytes) / (0.1 * GB), rel=0.25)
