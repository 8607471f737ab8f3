"""The plan of an update of many hosts, as columns: which bucket, from whom, along which chain, over which lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ckpt_core.bucket import ALIGN_BYTES
from ckpt_core.errors import CapacityError
from ckpt_core.manifest import Manifest
from ckpt_core.routing.bounds import Demand, LaneKind, measure_demand
from ckpt_core.routing.columns import Floats, Ints
from ckpt_core.routing.host_classes import HostClasses, host_classes
from ckpt_core.routing.lanes import NONE, Lanes, Rings, assign_lanes
from ckpt_core.routing.needs import ClassNeeds, Patterns, find_patterns
from ckpt_core.routing.order import natural_order
from ckpt_core.routing.pieces import Packed, cut_pieces, pack
from ckpt_core.routing.topology import STRIPE_BYTES, Topology

_GB = 1e9
_LARGEST_BUCKET_BYTES = 16 << 20
_BUCKETS_PER_LANE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedPlan:
    """Who sends what to whom. `ckpt_core.routing.views` reads it out for one host or rank.

    Attributes:
        structure_digest: of the manifests it holds for.
        bucket_bytes: size of a bucket at most.
        topology, hosts: for whom.
        patterns: what ranks need.
        packed: buckets and their pieces.
        lanes: their owners and lanes.
        rings: receivers of each bucket, in the order that chains follow.
        demand: what hosts need, and lower bounds.
    """

    structure_digest: str
    bucket_bytes: int
    topology: Topology
    hosts: HostClasses
    patterns: Patterns
    packed: Packed
    lanes: Lanes
    rings: Rings
    demand: Demand

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return len(self.packed.size_bytes)

    def digest(self) -> str:
        """xxh3-128 of all columns: what hosts agree on."""
        state = xxhash.xxh3_128(self.structure_digest.encode())
        packed, lanes = self.packed, self.lanes
        pieces = packed.pieces
        columns = (pieces.tensor, pieces.box, packed.offset_bytes, packed.first_piece, packed.receivers, packed.holders)
        for column in (*columns, lanes.owner, lanes.owner_nic, lanes.chain_start, lanes.slot, lanes.nic, lanes.gpu):
            state.update(column.tobytes())
        state.update(repr((pieces.boxes, pieces.receiver_sets, self.topology.holder_sets)).encode())
        return state.hexdigest()

    def chain(self, bucket: int) -> Ints:
        """Hosts in the order in which a bucket reaches them, its owner not among them."""
        ring = self.rings.remote(int(self.packed.receivers[bucket]), int(self.packed.holders[bucket]))
        return np.roll(ring, -int(self.lanes.chain_start[bucket])) if len(ring) else ring

    def local(self, bucket: int) -> Ints:
        """Hosts that take a bucket from their own pool."""
        return self.rings.local(int(self.packed.receivers[bucket]), int(self.packed.holders[bucket]))

    def lane_seconds(self) -> dict[LaneKind, Floats]:
        """Time that each lane is busy, by host and lane."""
        nic = self.topology.nic_gb_s[:, None] * _GB
        return {
            LaneKind.NIC_IN: self.lanes.nic_in_bytes / nic,
            LaneKind.NIC_OUT: self.lanes.nic_out_bytes / nic,
            LaneKind.PCIE: self.lanes.pcie_bytes / (self.topology.pcie_gb_s[:, None] * _GB),
        }

    def busiest_s(self) -> dict[LaneKind, float]:
        """Time of the busiest lane of each kind."""
        return {kind: float(seconds.max(initial=0.0)) for kind, seconds in self.lane_seconds().items()}

    @property
    def busiest_over_bound(self) -> float:
        """Busiest lane of all against the lower bound: 1 is perfect."""
        bound = max(self.demand.lower_bound_s.values())
        return max(self.busiest_s().values()) / bound if bound else 1.0


def make_routed_plan(
    manifest: Manifest,
    classes: Sequence[ClassNeeds],
    topology: Topology,
    *,
    bucket_bytes: int | None = None,
    order: Ints | None = None,
) -> RoutedPlan:
    """Plan to bring every rank what its class needs.

    Args:
        manifest: the checkpoint; contents do not matter.
        classes: what the ranks of each class need.
        topology: hosts, ranks and who has which tensor.
        bucket_bytes: largest bucket; by default 16 MiB, less where lanes would get too few to be even.
        order: of the manifest's tensors; by default `natural_order`.

    Raises:
        CapacityError: a topology of another checkpoint, or a host that can neither send nor receive what it must.
        CoverageError: a slice is not inside its tensor.
    """
    _check_fits(manifest, classes, topology, bucket_bytes)
    hosts = host_classes(topology)
    patterns = find_patterns(manifest, classes)
    size = bucket_bytes or even_bucket_bytes(manifest, topology)
    order = natural_order(manifest) if order is None else order
    pieces = cut_pieces(manifest, patterns, hosts, order, bucket_bytes=size)
    window = min(STRIPE_BYTES, max(manifest.size_bytes, 1)) * len(topology.holder_sets)
    packed = pack(pieces, topology, bucket_bytes=size, window_bytes=window)
    rings = Rings(hosts=hosts, receiver_sets=pieces.receiver_sets, holder_sets=topology.holder_sets)
    lanes = assign_lanes(packed, hosts, topology, rings)
    _check_reachable(lanes, topology)
    return RoutedPlan(
        structure_digest=manifest.structure_digest,
        bucket_bytes=size,
        topology=topology,
        hosts=hosts,
        patterns=patterns,
        packed=packed,
        lanes=lanes,
        rings=rings,
        demand=measure_demand(pieces, hosts, topology),
    )


def even_bucket_bytes(manifest: Manifest, topology: Topology) -> int:
    """Size of a bucket, at most 16 MiB, of which each lane of a host gets some tens."""
    most_lanes = max(int(topology.nics.max()), int(topology.gpus.max()), 1)
    wanted = manifest.size_bytes // (most_lanes * _BUCKETS_PER_LANE)
    return max(ALIGN_BYTES * 4, min(_LARGEST_BUCKET_BYTES, wanted // ALIGN_BYTES * ALIGN_BYTES))


def _check_fits(
    manifest: Manifest, classes: Sequence[ClassNeeds], topology: Topology, bucket_bytes: int | None
) -> None:
    if len(topology.holder_of) != len(manifest.tensors):
        raise CapacityError(
            f"topology: expected a holder for each of {len(manifest.tensors)} tensors, got {len(topology.holder_of)}; "
            "describe who has this checkpoint in its pool"
        )
    if int(topology.rank_class.max()) >= len(classes) or int(topology.rank_class.min()) < 0:
        raise CapacityError(
            f"topology: expected classes 0 to {len(classes) - 1}, got {int(topology.rank_class.max())}; "
            "give what each class of ranks needs"
        )
    if bucket_bytes is not None and bucket_bytes < ALIGN_BYTES:
        raise CapacityError(
            f"bucket size: expected at least {ALIGN_BYTES} bytes, got {bucket_bytes}; give some tens of MiB"
        )


def _check_reachable(lanes: Lanes, topology: Topology) -> None:
    without = topology.nics == 0
    sends = lanes.owner != NONE
    stuck = (without & lanes.nic_in_bytes.any(axis=1)) | (
        without & np.isin(np.arange(len(without)), lanes.owner[sends])
    )
    if stuck.any():
        raise CapacityError(
            f"host {int(np.flatnonzero(stuck)[0])}: expected a NIC, since it must send to or receive from other hosts, "
            "got none; put what it needs into its own pool"
        )
