"""The directory of a fleet: who offers which version, and what the fleet runs. `ckpt serve` answers with it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ckpt_core.errors import ConfigError
from ckpt_core.membership import FleetVersion, Membership, Offering, OwnerEntry, OwnerRow
from ckpt_core.p2p.offers import Offer
from ckpt_core.store import Store
from ckpt_core.store_records import EngineRecord

_LEASES_S = 0.5, 3600.0
_NAME_CHARS = 200
_JOINED = ""  # instead of an update of this host's controllers


class Directory:
    """Over a store: what the controllers of this host write there is what the fleet runs. For threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        store.owners.grant_all()

    def register(self, entry: OwnerEntry) -> Membership:
        """An owner lives.

        Raises:
            ConfigError: a lease or names out of bounds.
            EngineStateError: a later life of it is there.
        """
        shortest, longest = _LEASES_S
        if not shortest <= entry.lease_s <= longest:
            raise ConfigError(f"lease: expected {shortest:g} to {longest:g} s, got {entry.lease_s:g}; choose another")
        for text in (entry.instance, entry.name, entry.address):
            if not 0 < len(text) <= _NAME_CHARS:
                raise ConfigError(f"owner: expected names of 1 to {_NAME_CHARS} characters, got {text!r:.250}")
        return self._store.owners.put(entry)

    def leave(self, instance: str) -> None:
        """It is gone."""
        self._store.owners.leave(instance)

    def offer(self, instance: str, digest: str, body: bytes) -> None:
        """It offers a version.

        Raises:
            ConfigError: that is no offer, or one of another version; or there is no such owner.
            ManifestError: its digest is not that of its tensors.
        """
        try:
            offer = msgspec.json.decode(body, type=Offer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"expected an offer, got something else ({error}); use one release on both sides"
            ) from error
        if offer.manifest().digest != digest:
            raise ConfigError(f"expected an offer of {digest!r:.100}, got one of {offer.digest}")
        self._store.owners.offer(instance, digest, offer.version, body)

    def withdraw(self, instance: str, digest: str) -> None:
        """It does not offer that version any more."""
        self._store.owners.withdraw(instance, digest)

    def owners(self) -> tuple[OwnerRow, ...]:
        """All that live."""
        return self._store.owners.rows()

    def offering(self, name: str) -> Offering:
        """See OwnerTable.offering."""
        return self._store.owners.offering(name)

    def offered(self, instance: str, digest: str) -> bytes:
        """An offer as JSON; see OwnerTable.offered."""
        return self._store.owners.offered(instance, digest)

    def fleet(self) -> FleetVersion:
        """What a controller committed last to any engine, and whether that is about to change."""
        newest = max(self._committed(), key=lambda record: record.committed_at, default=None)
        return FleetVersion(
            epoch=self._store.owners.epoch(),
            digest=newest.digest if newest else "",
            version=newest.version if newest else "",
            updating=any(not update.controller.is_gone() for update in self._store.in_flight()),
        )

    def joined(self, records: Sequence[EngineRecord]) -> None:
        """Engines run this now. Who joins does not say what the fleet runs, and its version is no newer for it."""
        urls = {record.url for record in records}
        others = sorted((one for one in self._store.engines() if one.url not in urls), key=lambda one: one.committed_at)
        known = {one.digest: one.committed_at for one in others}
        newest = max((one.committed_at for one in others if one.update_id != _JOINED), default=None)
        for record in records:
            own = record.committed_at if newest is None else newest - 1.0
            at = known.get(record.digest, own)
            self._store.put_engine(msgspec.structs.replace(record, committed_at=at, update_id=_JOINED))

    def _committed(self) -> list[EngineRecord]:
        return [record for record in self._store.engines() if record.update_id != _JOINED]
