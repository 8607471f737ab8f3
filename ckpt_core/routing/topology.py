"""The machines of an update: hosts, their ranks and lanes, and who has which tensor in its pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_core.errors import CapacityError
from ckpt_core.manifest import Manifest
from ckpt_core.routing.columns import Floats, Ints, ints, starts_of

STRIPE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Hosts by number, ranks by number. Rates are GB/s (1e9 bytes) of one NIC or GPU, each way.

    Attributes:
        rank_host, rank_class: where each rank is, and which of the layouts it has.
        nics, nic_gb_s: NICs of each host, and the rate of one. A host without may only take from its own pool.
        gpus, pcie_gb_s: GPUs with a ring of each host (0 where no rank is), and the rate from NIC or pool into one.
        holder_sets: hosts that have the same tensors in their pools.
        holder_of: by tensor of the manifest: which of these sets has it.

    Raises:
        CapacityError: numbers that fit no cluster.
    """

    rank_host: Ints
    rank_class: Ints
    nics: Ints
    nic_gb_s: Floats
    gpus: Ints
    pcie_gb_s: Floats
    holder_sets: tuple[tuple[int, ...], ...]
    holder_of: Ints

    def __post_init__(self) -> None:
        hosts = len(self.nics)
        _require(hosts > 0 and len(self.rank_host) > 0, "at least one host with a rank", f"{hosts} hosts")
        same = {len(column) for column in (self.nics, self.nic_gb_s, self.gpus, self.pcie_gb_s)}
        _require(len(same) == 1, "one number per host in each column", f"columns of {sorted(same)}")
        _require(len(self.rank_host) == len(self.rank_class), "host and class of each rank", "one without the other")
        inside = self.rank_host.min() >= 0 and self.rank_host.max() < hosts
        _require(bool(inside), f"ranks on hosts 0 to {hosts - 1}", f"rank on host {self.rank_host.max()}")
        _require(bool((self.gpus[self.rank_host] > 0).all()), "a GPU on each host with ranks", "a host without")
        positive = (self.nic_gb_s > 0).all() and (self.pcie_gb_s > 0).all() and (self.nics >= 0).all()
        _require(bool(positive), "rates above 0", "a rate of 0 or less")
        known = all(group and set(group) <= set(range(hosts)) for group in self.holder_sets)
        _require(known, f"holders among hosts 0 to {hosts - 1}, at least one for each set", self.holder_sets)
        if len(self.holder_of):
            found = self.holder_of.min() >= 0 and self.holder_of.max() < len(self.holder_sets)
            _require(bool(found), "a holder for each tensor", "a tensor that nobody has")

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.nics)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.rank_host)


def uniform(
    *,
    ranks: int,
    ranks_per_host: int,
    classes: int,
    holder_sets: Sequence[Sequence[int]],
    holder_of: Ints,
    nics: int = 8,
    nic_gb_s: float = 50.0,
    pcie_gb_s: float = 55.0,
    more_hosts: int = 0,
) -> Topology:
    """Hosts that are all alike: rank r on host r // ranks_per_host, of class r % classes, one GPU a rank.

    Args:
        more_hosts: hosts behind the others that have no rank: trainers that hold weights.
    """
    with_ranks = -(-ranks // ranks_per_host)
    hosts = with_ranks + more_hosts
    gpus = np.full(hosts, ranks_per_host, dtype=np.int64)
    gpus[with_ranks:] = 0
    numbers = np.arange(ranks, dtype=np.int64)
    return Topology(
        rank_host=numbers // ranks_per_host,
        rank_class=numbers % classes,
        nics=np.full(hosts, nics, dtype=np.int64),
        nic_gb_s=np.full(hosts, nic_gb_s),
        gpus=gpus,
        pcie_gb_s=np.full(hosts, pcie_gb_s),
        holder_sets=tuple(tuple(group) for group in holder_sets),
        holder_of=holder_of,
    )


def striped(manifest: Manifest, order: Ints, holders: int, *, stripe_bytes: int = STRIPE_BYTES) -> Ints:
    """`holder_of` for a checkpoint dealt to holders in stripes of consecutive tensors.

    Stripes keep modules together, and each holder has something for all receivers: neighbouring stripes, which the same
    receivers need, go to holders far from each other (steps of the golden ratio).
    """
    sizes = ints(manifest.sizes_bytes)[order]
    total = int(sizes.sum())
    stripes = max(1, min(stripe_bytes, -(-total // holders)))
    step = next(step for step in range(max(1, round(holders * 0.618)), 2 * holders + 1) if math.gcd(step, holders) == 1)
    holder_of = np.zeros(len(order), dtype=np.int64)
    holder_of[order] = starts_of(sizes)[:-1] // stripes % holders * step % holders
    return holder_of


def _require(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise CapacityError(f"topology: expected {expected}, got {got!s:.200}; describe the cluster as it is")
