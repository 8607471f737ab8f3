"""Shares of owners by their NICs, and the least time that a join can take."""

import pytest

from ckpt_core.dtypes import DType
from ckpt_core.p2p.nics import LinkLayer, Nic, NicKind, Port
from ckpt_core.p2p.offers import Offer, OfferedNic
from ckpt_core.p2p.read_plan import expected_of, planned
from ckpt_core.source import Extent, RemoteOwner, RemotePools, SourceIndex
from ckpt_core.transport.p2p.base import Library

MIB = 1 << 20
SIZE_BYTES = 400 * MIB


def nic(name="mlx5_0", gbit_s=400.0, kind=NicKind.RDMA):
    port = Port(number=1, layer=LinkLayer.INFINIBAND, gbit_s=gbit_s, up=True)
    return Nic(name=name, kind=kind, ports=(port,), node=None, path=())


def offer(rates, *, rdma=True, max_bytes_per_s=0.0):
    nics = tuple(OfferedNic(name=f"n{number}", bytes_per_s=rate) for number, rate in enumerate(rates))
    return Offer(
        owner="o",
        library=Library.MOONCAKE,
        contact="c",
        version="v",
        digest="d",
        tensors=(),
        nics=nics,
        rdma=rdma,
        max_bytes_per_s=max_bytes_per_s,
    )


def plan(offers, nics=(), *, max_bytes_per_s=0.0, sizes=SIZE_BYTES, count=4):
    owners = tuple(RemoteOwner(name="o", library="mooncake", contact="c", addresses=()) for _ in offers)
    size = sizes // count
    extents = tuple(
        Extent(name=f"t{number}", dtype=DType.U8, shape=(size,), file=0, offset_bytes=0, size_bytes=size)
        for number in range(count)
    )
    remote = RemotePools(owners=owners, version="v", digests=(), leaves=b"", max_bytes_per_s=max_bytes_per_s)
    return planned(SourceIndex(files=(), extents=extents, remote=remote), offers, nics).remote


def shares(remote):
    return [owner.share for owner in remote.owners]


def test_owners_give_by_the_rates_of_their_nics():
    remote = plan([offer([1e8]), offer([2e8, 1e8])])
    assert shares(remote) == pytest.approx([0.25, 0.75], abs=0.01)
    assert remote.expected.bound_s == pytest.approx(SIZE_BYTES / 4e8)
    assert remote.expected.seconds == pytest.approx(remote.expected.bound_s, rel=0.02)
    assert "n0" in remote.expected.lanes
    assert expected_of(remote).lower_bound_s == remote.expected.bound_s


def test_a_max_rate_of_an_owner_counts():
    remote = plan([offer([3e8], max_bytes_per_s=1e8), offer([3e8])])
    assert shares(remote) == pytest.approx([0.25, 0.75], abs=0.01)


def test_this_hosts_nic_or_its_max_rate_may_be_what_limits():
    offers = [offer([1e9]), offer([1e9])]
    narrow = plan(offers, [nic(gbit_s=0.8)])
    assert narrow.expected.bound_s == pytest.approx(SIZE_BYTES / 1e8)
    assert "here/mlx5_0" in narrow.expected.lanes
    limited = plan(offers, [nic()], max_bytes_per_s=1e7)
    assert limited.expected.bound_s == pytest.approx(SIZE_BYTES / 1e7)
    assert limited.expected.lanes == "max rate of this host"


def test_rates_that_nobody_tells_say_nothing_and_share_evenly():
    remote = plan([offer([0.0]), offer([])], [nic(gbit_s=None)])
    assert remote.expected is None
    assert expected_of(remote) is None
    assert shares(remote) == pytest.approx([0.5, 0.5], abs=0.01)


def test_rdma_only_where_all_have_it():
    assert plan([offer([1e9])], [nic()]).rdma == ("mlx5_0",)
    assert plan([offer([1e9]), offer([1e9], rdma=False)], [nic()]).rdma == ()
    assert plan([offer([1e9])], [nic(kind=NicKind.NETWORK)]).rdma == ()


def test_a_version_without_bytes():
    remote = plan([offer([1e9]), offer([1e9])], sizes=0)
    assert shares(remote) == [0.5, 0.5]
