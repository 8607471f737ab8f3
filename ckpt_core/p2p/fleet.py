"""Who has which pieces and who wants them: what an assignment of reads is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_core.errors import PlanError
from ckpt_core.routing.columns import Ints

ANYWHERE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class NicLane:
    """One NIC of an owner or a receiver, one way.

    Attributes:
        bytes_per_s: measured, or nominal.
        nodes: memory nodes whose bytes may cross it, where it is too far from others; None for all.
    """

    name: str
    bytes_per_s: float
    nodes: frozenset[int] | None = None

    def serves(self, node: int) -> bool:
        """Whether bytes at a memory node may cross it; ANYWHERE is near every NIC."""
        return self.nodes is None or node == ANYWHERE or node in self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A running agent whose host pool is read.

    Attributes:
        name: for messages and reports.
        holds: numbers of the pieces in its pool, each once.
        held_at: memory node of each of these; None for anywhere.
        max_bytes_per_s: what it gives in all, over all its NICs; None for no limit.
    """

    name: str
    nics: tuple[NicLane, ...]
    holds: Ints
    held_at: Ints | None = None
    max_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """Who joins: a host, with the NICs that it reads through.

    Attributes:
        name: for messages and reports.
        wants: numbers of the pieces, each once, in the order in which they are to come.
        wanted_at: memory node that each is to come to; None for anywhere.
    """

    name: str
    nics: tuple[NicLane, ...]
    wants: Ints
    wanted_at: Ints | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Owners, receivers and the pieces between them, all by number. Any owner's NIC reaches any receiver's.

    Attributes:
        sizes_bytes: of each piece.

    Raises:
        PlanError: numbers that fit no fleet.
    """

    owners: tuple[Owner, ...]
    receivers: tuple[Receiver, ...]
    sizes_bytes: Ints

    def __post_init__(self) -> None:
        if len(self.sizes_bytes) and int(self.sizes_bytes.min()) < 0:
            raise PlanError(f"pieces: expected sizes from 0, got {int(self.sizes_bytes.min())}; measure them again")
        _check_names([owner.name for owner in self.owners])
        for owner in self.owners:
            self._check(f"owner {owner.name}", owner.nics, owner.holds, owner.held_at)
            if owner.max_bytes_per_s is not None:
                _check_rate(f"owner {owner.name}: max rate", owner.max_bytes_per_s)
        for receiver in self.receivers:
            self._check(f"receiver {receiver.name}", receiver.nics, receiver.wants, receiver.wanted_at)

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self.sizes_bytes)

    def _check(self, who: str, nics: Sequence[NicLane], pieces: Ints, nodes: Ints | None) -> None:
        if len(pieces) and not nics:
            raise PlanError(f"{who}: expected a NIC, got none; give it one or leave it out")
        for nic in nics:
            _check_rate(f"{who}, NIC {nic.name}", nic.bytes_per_s)
        if len(pieces) and not (int(pieces.min()) >= 0 and int(pieces.max()) < self.pieces):
            raise PlanError(
                f"{who}: expected pieces 0 to {self.pieces - 1}, got {int(pieces.min())} to {int(pieces.max())}; "
                "number them as in sizes_bytes"
            )
        if len(np.unique(pieces)) != len(pieces):
            raise PlanError(f"{who}: expected each piece once, got one several times; name it once")
        if nodes is not None and len(nodes) != len(pieces):
            raise PlanError(
                f"{who}: expected a memory node for each of {len(pieces)} pieces, got {len(nodes)}; give all or none"
            )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"owners: expected names that differ, got {name} twice; name each host or agent once")


def _check_rate(what: str, bytes_per_s: float) -> None:
    if not 0 < bytes_per_s < math.inf:
        raise PlanError(f"{what}: expected bytes a second above 0, got {bytes_per_s}; measure it, or leave it out")
