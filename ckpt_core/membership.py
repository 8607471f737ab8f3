"""What owners, those who join, and their directory tell each other: bodies of its HTTP calls."""

from __future__ import annotations

import msgspec


class OwnerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One life of an owner.

    Attributes:
        instance: of this life; unique.
        name: for messages.
        address: of the owner over all of its lives: a later life takes the place of the one before.
        born_at: unix seconds; of two lives at one address the later counts.
        lease_s: it is taken for gone when it was not heard of for so long.
    """

    instance: str
    name: str
    address: str
    born_at: float
    lease_s: float


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """What the directory knows of an owner that it just heard of.

    Attributes:
        epoch: changes whenever anybody joins, leaves, runs out of its lease, or offers something else.
        offers: digests of what it offers, as far as the directory knows.
    """

    epoch: int
    offers: tuple[str, ...]


class Offering(msgspec.Struct, frozen=True, kw_only=True):
    """Who offers a version; `owners` are instances."""

    epoch: int
    digest: str
    version: str
    owners: tuple[str, ...]


class OwnerRow(msgspec.Struct, frozen=True, kw_only=True):
    """An owner, for people and machines; versions by digest, with their labels."""

    entry: OwnerEntry
    expires_at: float
    versions: dict[str, str]


class FleetVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet runs.

    Attributes:
        digest, version: committed last, and its label; "" where nothing was.
        updating: an update is under way that may change this.
    """

    epoch: int
    digest: str
    version: str
    updating: bool
