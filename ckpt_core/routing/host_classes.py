"""Hosts that need the same bytes and have lanes of the same number: planned once for all of a kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt_core.routing.columns import Ints, ints
from ckpt_core.routing.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClasses:
    """Kinds of hosts.

    Attributes:
        of_host: kind of each host; -1 for hosts without ranks.
        rank_classes: by kind: the different classes of ranks on such a host.
        nics, gpus: by kind.
    """

    of_host: Ints
    rank_classes: tuple[tuple[int, ...], ...]
    nics: Ints
    gpus: Ints

    def __len__(self) -> int:
        return len(self.rank_classes)

    def hosts_of(self, kind: int) -> Ints:
        """Numbers of the hosts of a kind."""
        return np.flatnonzero(self.of_host == kind)

    def hosts_of_set(self, mask: int) -> Ints:
        """Numbers of the hosts whose kind is in a bit set, ascending."""
        inside = np.array([mask >> kind & 1 for kind in range(len(self))] + [0], dtype=np.bool_)
        return np.flatnonzero(inside[self.of_host])  # -1 reads the last: never inside


def host_classes(topology: Topology) -> HostClasses:
    """Sort hosts into kinds, in order of their first host."""
    members: list[set[int]] = [set() for _ in range(topology.hosts)]
    for host, rank_class in zip(topology.rank_host.tolist(), topology.rank_class.tolist(), strict=True):
        members[host].add(rank_class)
    kinds: dict[tuple[tuple[int, ...], int, int], int] = {}
    of_host = []
    for host, classes in enumerate(members):
        key = (tuple(sorted(classes)), int(topology.nics[host]), int(topology.gpus[host]))
        of_host.append(kinds.setdefault(key, len(kinds)) if classes else -1)
    return HostClasses(
        of_host=ints(of_host),
        rank_classes=tuple(classes for classes, _, _ in kinds),
        nics=ints([nics for _, nics, _ in kinds]),
        gpus=ints([gpus for _, _, gpus in kinds]),
    )
