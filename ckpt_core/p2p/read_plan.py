"""A join as the assignment sees it: which owner should give which share of the bytes, and what that takes at least.

Agents take the shares as weights, not as orders: whoever is slower than its NIC says gives less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ckpt_core.cost import Prediction
from ckpt_core.p2p.assignment import Assignment, assign_reads
from ckpt_core.p2p.fleet import Fleet, NicLane, Owner, Receiver
from ckpt_core.p2p.nics import Nic, NicKind
from ckpt_core.p2p.offers import Offer
from ckpt_core.source import ReadTime, RemotePools, SourceIndex

_UNKNOWN_BYTES_PER_S = 1e13  # beyond any NIC: a lane whose rate nobody tells is never what limits


def planned(index: SourceIndex, offers: Sequence[Offer], nics: Sequence[Nic]) -> SourceIndex:
    """The same version with a share for each of its owners.

    Args:
        offers: in order of the index's owners.
        nics: of this host.
    """
    assert index.remote is not None
    assignment = assign_reads(_fleet(index, offers, nics))
    reads = assignment.reads
    given = np.bincount(reads.owner, reads.size_bytes, len(offers)) if len(reads) else np.ones(len(offers))
    shares = given / given.sum()
    owners = [replace(owner, share=share) for owner, share in zip(index.remote.owners, shares.tolist(), strict=True)]
    rdma = tuple(nic.name for nic in nics if nic.kind is NicKind.RDMA and all(offer.rdma for offer in offers))
    remote = replace(index.remote, owners=tuple(owners), rdma=rdma, expected=_time(assignment, index.remote))
    return replace(index, remote=remote)


def expected_of(remote: RemotePools) -> Prediction | None:
    """As reports have it; None where a rate that nobody tells would decide."""
    time = remote.expected
    if time is None:
        return None
    return Prediction(
        seconds=time.seconds, lower_bound_s=time.bound_s, bottleneck=time.lanes, busy_s={time.lanes: time.bound_s}
    )


def _fleet(index: SourceIndex, offers: Sequence[Offer], nics: Sequence[Nic]) -> Fleet:
    sizes = np.array([extent.size_bytes for extent in index.extents], dtype=np.int64)
    pieces = np.arange(len(sizes))
    here = [NicLane(name=nic.name, bytes_per_s=nic.bytes_per_s or _UNKNOWN_BYTES_PER_S) for nic in nics]
    return Fleet(
        owners=tuple(
            Owner(
                name=f"{number}:{offer.owner}",
                nics=_lanes(offer),
                holds=pieces,
                max_bytes_per_s=offer.max_bytes_per_s or None,
            )
            for number, offer in enumerate(offers)
        ),
        receivers=(Receiver(name="here", nics=tuple(here) or (_unknown(),), wants=pieces),),
        sizes_bytes=sizes,
    )


def _lanes(offer: Offer) -> tuple[NicLane, ...]:
    found = [NicLane(name=nic.name, bytes_per_s=nic.bytes_per_s or _UNKNOWN_BYTES_PER_S) for nic in offer.nics]
    return tuple(found) or (_unknown(),)


def _unknown() -> NicLane:
    return NicLane(name="any", bytes_per_s=_UNKNOWN_BYTES_PER_S)


def _time(assignment: Assignment, remote: RemotePools) -> ReadTime | None:
    """None where a rate that nobody tells would decide."""
    bound, lanes = assignment.bound, ", ".join(assignment.bound.lanes)
    slowest = min(bound.bytes_per_s, remote.max_bytes_per_s or _UNKNOWN_BYTES_PER_S)
    if not bound.size_bytes or slowest >= _UNKNOWN_BYTES_PER_S:
        return None
    if slowest < bound.bytes_per_s:
        seconds = bound.size_bytes / slowest
        return ReadTime(seconds=seconds, bound_s=seconds, lanes="max rate of this host")
    return ReadTime(seconds=assignment.busiest_s, bound_s=bound.seconds, lanes=lanes)
