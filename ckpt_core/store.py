"""What must survive the controller: versions, what each engine runs, updates in flight.

Other processes may use the same store at the same time, and so may threads. What a call wrote survives its process.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ckpt_core.errors import ConfigError, ManifestError, Outcome
from ckpt_core.store_file import StoreFile
from ckpt_core.store_owners import OwnerTable
from ckpt_core.store_records import EngineRecord, UpdateEndpoint, UpdateRecord, VersionRecord
from ckpt_core.store_rows import outcomes_json, update_of, version_of, version_row

__all__ = ["EngineRecord", "Store", "UpdateEndpoint", "UpdateRecord", "VersionRecord"]

STORE_FILE = "store.sqlite3"
_BUSY_TIMEOUT_S = 30.0
_VERSIONS = "SELECT digest, label, manifest, source, created_at, used_at FROM versions"
_UPDATES = "SELECT record, state, ended_at, outcomes FROM updates"


class Store:
    """The records of one directory.

    Attributes:
        identity: of this store, made with it.
        owners: whose memory those who join may read.
    """

    def __init__(self, directory: Path, *, timeout_s: float = _BUSY_TIMEOUT_S) -> None:
        """Open the store of a directory, or make it.

        Args:
            directory: a private one; made 0700 if absent.
            timeout_s: how long to wait for other writers.

        Raises:
            ConfigError: see StoreFile.
        """
        self._file = StoreFile(Path(directory) / STORE_FILE, timeout_s=timeout_s)
        self.identity: str = self._file.rows("SELECT identity FROM store")[0][0]
        self.owners = OwnerTable(self._file)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    # -- versions ----------------------------------------------------------------------------------------------
    def put_version(self, record: VersionRecord) -> None:
        """Write a version, or where the bytes of a known one are now; a label that is not empty is bound to it for good.

        Raises:
            ManifestError: the digest is not the manifest's.
            ConfigError: the label is bound to another version.
        """
        if record.digest != record.manifest.digest:
            raise ManifestError(
                f"version {record.label!r:.200}: expected the manifest's digest {record.manifest.digest}, got "
                f"{record.digest}; make the record with VersionRecord.of"
            )
        row = version_row(record)
        with self._file.transaction() as connection:
            _check_label(connection, record.label, record.digest)
            connection.execute(
                f"INSERT INTO versions ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"  # noqa: S608
                " ON CONFLICT (digest) DO UPDATE SET label = iif(excluded.label = '', label, excluded.label),"
                " source = excluded.source, used_at = max(used_at, excluded.used_at)",
                row,
            )
            if record.label:
                connection.execute("INSERT OR IGNORE INTO labels VALUES (?, ?)", (record.label, record.digest))

    def check_label(self, label: str, digest: str) -> None:
        """Raise ConfigError where a label is bound to another version."""
        with self._file.transaction() as connection:
            _check_label(connection, label, digest)

    def release_label(self, label: str) -> None:
        """Let a label be bound to another version."""
        with self._file.transaction() as connection:
            connection.execute("DELETE FROM labels WHERE label = ?", (label,))
            connection.execute("UPDATE versions SET label = '' WHERE label = ?", (label,))

    def versions(self) -> tuple[VersionRecord, ...]:
        """All versions, newest first."""
        return tuple(version_of(*row) for row in self._file.rows(_VERSIONS + " ORDER BY created_at DESC, rowid DESC"))

    def version(self, name: str) -> VersionRecord:
        """The version of that digest, label, or beginning of a digest; the first of these that fits.

        Raises:
            ConfigError: there is none, or several digests begin so.
        """
        by_label = " WHERE digest = (SELECT digest FROM labels WHERE label = ?)"
        for condition in (" WHERE digest = ?", by_label):
            if found := self._file.rows(_VERSIONS + condition, name):
                return version_of(*found[0])
        known = self._file.rows("SELECT digest, label FROM versions ORDER BY created_at DESC, rowid DESC")
        fitting = [(digest, label) for digest, label in known if name and digest.startswith(name)]
        if len(fitting) == 1:
            return self.version(fitting[0][0])
        what, candidates = ("several", fitting) if fitting else ("none", known)
        names = (
            ", ".join(f"{digest} ({label or 'no label'})" for digest, label in candidates[:8]) or "no versions at all"
        )
        raise ConfigError(
            f"version {name!r:.200}: expected a label, a digest or the beginning of one, got {what} of that name; "
            f"name one of: {names}{', ...' if len(candidates) > 8 else ''}"
        )

    def touch_version(self, digest: str) -> None:
        """Note that a version was used now."""
        with self._file.transaction() as connection:
            connection.execute("UPDATE versions SET used_at = max(used_at, ?) WHERE digest = ?", (time.time(), digest))

    def forget_version(self, digest: str) -> None:
        """Drop a version with its labels, if there is such a one."""
        with self._file.transaction() as connection:
            connection.execute("DELETE FROM versions WHERE digest = ?", (digest,))

    # -- engines -----------------------------------------------------------------------------------------------
    def put_engine(self, record: EngineRecord) -> None:
        """Write what an engine runs."""
        with self._file.transaction() as connection:
            _put_engine(connection, record)

    def engine(self, url: str) -> EngineRecord | None:
        """What an engine runs; None where that is not known."""
        found = self._file.rows("SELECT record FROM engines WHERE url = ?", url)
        return msgspec.json.decode(found[0][0], type=EngineRecord) if found else None

    def engines(self) -> tuple[EngineRecord, ...]:
        """What all engines run, by url."""
        rows = self._file.rows("SELECT record FROM engines ORDER BY url")
        return tuple(msgspec.json.decode(record, type=EngineRecord) for (record,) in rows)

    def forget_engine(self, url: str) -> None:
        """Drop an engine, if there is such a one."""
        with self._file.transaction() as connection:
            connection.execute("DELETE FROM engines WHERE url = ?", (url,))

    # -- updates -----------------------------------------------------------------------------------------------
    def begin_update(self, record: UpdateRecord) -> None:
        """Write down that an update begins.

        Raises:
            ConfigError: there is one of that name, or it has an end.
        """
        if record.ended_at is not None:
            raise ConfigError(f"update {record.update_id!r}: expected one that begins, got one that ended")
        with self._file.transaction() as connection:
            if connection.execute("SELECT 1 FROM updates WHERE update_id = ?", (record.update_id,)).fetchone():
                raise ConfigError(
                    f"update {record.update_id!r}: expected a new name, got a known one; name it otherwise"
                )
            connection.execute(
                "INSERT INTO updates (update_id, state, outcomes, record) VALUES (?, ?, '{}', ?)",
                (record.update_id, record.state, msgspec.json.encode(record).decode()),
            )

    def move_update(self, update_id: str, state: str) -> None:
        """Write down what an update does from now on.

        Raises:
            ConfigError: it is not in flight.
        """
        with self._file.transaction() as connection:
            _change_update(connection, update_id, "state = ?", state)

    def end_update(self, update_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """Write down that an update ended, and how by url.

        Raises:
            ConfigError: it is not in flight.
        """
        with self._file.transaction() as connection:
            _change_update(connection, update_id, "ended_at = ?, outcomes = ?", time.time(), outcomes_json(outcomes))

    def commit_update(self, update_id: str, engines: Sequence[EngineRecord]) -> None:
        """Write down what the engines run now and that the update ended committed, all of it or nothing.

        Raises:
            ConfigError: it is not in flight.
        """
        outcomes = dict.fromkeys((record.url for record in engines), Outcome.COMMITTED)
        change = "state = ?, ended_at = ?, outcomes = ?"
        with self._file.transaction() as connection:
            for record in engines:
                _put_engine(connection, record)
            _change_update(connection, update_id, change, Outcome.COMMITTED.value, time.time(), outcomes_json(outcomes))

    def update(self, update_id: str) -> UpdateRecord:
        """One update.

        Raises:
            ConfigError: there is none of that name.
        """
        found = self._file.rows(f"{_UPDATES} WHERE update_id = ?", update_id)
        if not found:
            raise ConfigError(f"update {update_id!r:.200}: expected in the store, got no such one; list the updates")
        return update_of(*found[0])

    def updates(self, limit: int) -> tuple[UpdateRecord, ...]:
        """The last updates, newest first."""
        rows = self._file.rows(f"{_UPDATES} ORDER BY number DESC LIMIT ?", limit)
        return tuple(update_of(*row) for row in rows)

    def in_flight(self) -> tuple[UpdateRecord, ...]:
        """Updates without an end, oldest first."""
        rows = self._file.rows(f"{_UPDATES} WHERE ended_at IS NULL ORDER BY number")
        return tuple(update_of(*row) for row in rows)

    def digests_in_use(self) -> frozenset[str]:
        """Versions that engines run, or that an update in flight comes from or goes to."""
        flying = self.in_flight()
        old = {endpoint.old_digest for update in flying for endpoint in update.endpoints}
        used = old | {update.new_digest for update in flying} | {engine.digest for engine in self.engines()}
        return frozenset(used - {""})


def _check_label(connection: sqlite3.Connection, label: str, digest: str) -> None:
    found = connection.execute("SELECT digest FROM labels WHERE label = ?", (label,)).fetchone()
    if found and found[0] != digest:
        raise ConfigError(
            f"label {label!r:.200}: expected it free or of version {digest}, got it bound to {found[0]}; "
            "choose another label, or forget that version first"
        )


def _put_engine(connection: sqlite3.Connection, record: EngineRecord) -> None:
    row = record.url, record.digest, msgspec.json.encode(record).decode()
    connection.execute("INSERT OR REPLACE INTO engines VALUES (?, ?, ?)", row)


def _change_update(connection: sqlite3.Connection, update_id: str, change: str, *values: str | float) -> None:
    changed = connection.execute(
        f"UPDATE updates SET {change} WHERE update_id = ? AND ended_at IS NULL",  # noqa: S608
        (*values, update_id),
    )
    if changed.rowcount != 1:
        raise ConfigError(
            f"update {update_id!r:.200}: expected in flight, got none of that name, or one that ended; begin a new one"
        )
