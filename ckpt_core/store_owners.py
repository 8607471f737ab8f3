"""The store's table of owners: who may be read by those who join, until when, and what each offers."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

import msgspec

from ckpt_core.errors import ConfigError, EngineStateError
from ckpt_core.membership import Membership, Offering, OwnerEntry, OwnerRow
from ckpt_core.store_file import StoreFile

_NOW_OFFERED = "SELECT digest, label FROM offers WHERE instance = ? ORDER BY number"


class OwnerTable:
    """See the module. Owners whose lease has run out are gone at the next call, whatever it is.

    Args:
        clock: unix seconds: leases outlive the process that granted them.
    """

    def __init__(self, file: StoreFile, *, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock

    def put(self, entry: OwnerEntry) -> Membership:
        """An owner lives: it is new, or its lease begins anew.

        Raises:
            EngineStateError: a later life of it is there.
        """
        with self._file.transaction() as connection:
            self._expire(connection)
            _make_room(connection, entry)
            known = connection.execute("SELECT 1 FROM owners WHERE instance = ?", (entry.instance,)).fetchone()
            expires_at = self._clock() + entry.lease_s
            if known:
                connection.execute("UPDATE owners SET expires_at = ? WHERE instance = ?", (expires_at, entry.instance))
            else:
                row = entry.instance, entry.address, msgspec.json.encode(entry).decode(), expires_at
                connection.execute("INSERT INTO owners VALUES (?, ?, ?, ?)", row)
                _changed(connection)
            offers = tuple(digest for digest, _ in connection.execute(_NOW_OFFERED, (entry.instance,)))
            return Membership(epoch=_epoch(connection), offers=offers)

    def grant_all(self) -> None:
        """Every lease begins anew: nobody could renew any while the directory was away."""
        with self._file.transaction() as connection:
            for instance, entry in connection.execute("SELECT instance, entry FROM owners").fetchall():
                expires_at = self._clock() + msgspec.json.decode(entry, type=OwnerEntry).lease_s
                connection.execute("UPDATE owners SET expires_at = ? WHERE instance = ?", (expires_at, instance))

    def leave(self, instance: str) -> None:
        """An owner is gone, if it was there."""
        with self._file.transaction() as connection:
            self._expire(connection)
            if connection.execute("DELETE FROM owners WHERE instance = ?", (instance,)).rowcount:
                _changed(connection)

    def offer(self, instance: str, digest: str, label: str, offer: bytes) -> None:
        """An owner offers a version.

        Raises:
            ConfigError: there is no such owner.
        """
        with self._file.transaction() as connection:
            self._expire(connection)
            if not connection.execute("SELECT 1 FROM owners WHERE instance = ?", (instance,)).fetchone():
                raise ConfigError(f"owner {instance!r:.100}: expected one with a lease, got none; register it first")
            connection.execute(
                "INSERT OR REPLACE INTO offers (instance, digest, label, offer) VALUES (?, ?, ?, ?)",
                (instance, digest, label, offer),
            )
            _changed(connection)

    def withdraw(self, instance: str, digest: str) -> None:
        """An owner does not offer a version any more."""
        with self._file.transaction() as connection:
            self._expire(connection)
            gone = connection.execute("DELETE FROM offers WHERE instance = ? AND digest = ?", (instance, digest))
            if gone.rowcount:
                _changed(connection)

    def epoch(self) -> int:
        """Changes with every change."""
        with self._file.transaction() as connection:
            self._expire(connection)
            return _epoch(connection)

    def rows(self) -> tuple[OwnerRow, ...]:
        """All owners, by address."""
        with self._file.transaction() as connection:
            self._expire(connection)
            found = connection.execute("SELECT instance, entry, expires_at FROM owners ORDER BY address").fetchall()
            return tuple(
                OwnerRow(
                    entry=msgspec.json.decode(entry, type=OwnerEntry),
                    expires_at=expires_at,
                    versions=dict(connection.execute(_NOW_OFFERED, (instance,)).fetchall()),
                )
                for instance, entry, expires_at in found
            )

    def offering(self, name: str) -> Offering:
        """Who offers the version of that digest, label, or beginning of a digest; for "" what was offered last.

        Raises:
            ConfigError: nobody does, or several versions are called so.
        """
        with self._file.transaction() as connection:
            self._expire(connection)
            digest, label = _named(connection, name)
            owners = connection.execute(
                "SELECT instance FROM offers WHERE digest = ? ORDER BY instance", (digest,)
            ).fetchall()
            return Offering(
                epoch=_epoch(connection), digest=digest, version=label, owners=tuple(one for (one,) in owners)
            )

    def offered(self, instance: str, digest: str) -> bytes:
        """One offer.

        Raises:
            ConfigError: it is not there any more.
        """
        with self._file.transaction() as connection:
            self._expire(connection)
            found = connection.execute(
                "SELECT offer FROM offers WHERE instance = ? AND digest = ?", (instance, digest)
            ).fetchone()
        if found is None:
            raise ConfigError(f"owner {instance!r:.100} does not offer {digest!r:.100} any more; ask who does")
        return bytes(found[0])

    def _expire(self, connection: sqlite3.Connection) -> None:
        if connection.execute("DELETE FROM owners WHERE expires_at < ?", (self._clock(),)).rowcount:
            _changed(connection)


def _make_room(connection: sqlite3.Connection, entry: OwnerEntry) -> None:
    """An earlier life at this address is over."""
    found = connection.execute(
        "SELECT entry FROM owners WHERE address = ? AND instance != ?", (entry.address, entry.instance)
    ).fetchone()
    if found is None:
        return
    other = msgspec.json.decode(found[0], type=OwnerEntry)
    if other.born_at > entry.born_at:
        raise EngineStateError(
            f"owner {entry.name!r:.100} at {entry.address!r:.100}: a later life of it, {other.instance!r:.100}, is registered; "
            "end this one, or give it another name"
        )
    connection.execute("DELETE FROM owners WHERE instance = ?", (other.instance,))
    _changed(connection)


def _named(connection: sqlite3.Connection, name: str) -> tuple[str, str]:
    known = connection.execute("SELECT digest, label FROM offers ORDER BY number DESC").fetchall()
    versions = dict(reversed(known))  # the newest label of each, in order of number
    fitting = (
        [digest for digest in versions if digest == name]
        or list(dict.fromkeys(digest for digest, label in known if label == name))
        or [digest for digest in versions if digest.startswith(name)]
    )
    if not name and known:
        fitting = [known[0][0]]
    if len(fitting) != 1:
        got = "several" if fitting else "nobody who offers it"
        names = ", ".join(f"{digest} ({label})" for digest, label in list(versions.items())[:8]) or "nothing at all"
        raise ConfigError(f"version {name!r:.200}: expected one, got {got}; offered: {names}")
    return fitting[0], versions[fitting[0]]


def _changed(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE membership SET epoch = epoch + 1")


def _epoch(connection: sqlite3.Connection) -> int:
    (epoch,) = connection.execute("SELECT epoch FROM membership").fetchone()
    return int(epoch)
