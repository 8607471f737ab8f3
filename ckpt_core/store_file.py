"""One SQLite file that processes and threads share, that nobody else reads, and that survives `kill -9`."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ckpt_core.errors import ConfigError
from ckpt_core.owned import locked, own_directory

_FIRST = (
    "CREATE TABLE store (identity TEXT NOT NULL)",
    "CREATE TABLE versions (digest TEXT PRIMARY KEY, label TEXT NOT NULL, size_bytes INTEGER NOT NULL,"
    " tensors INTEGER NOT NULL, manifest BLOB NOT NULL, source TEXT NOT NULL, created_at REAL NOT NULL,"
    " used_at REAL NOT NULL)",
    "CREATE TABLE labels (label TEXT PRIMARY KEY, digest TEXT NOT NULL REFERENCES versions (digest) ON DELETE CASCADE)",
    "CREATE INDEX labels_by_digest ON labels (digest)",
    "CREATE TABLE engines (url TEXT PRIMARY KEY, digest TEXT NOT NULL, record TEXT NOT NULL)",
    "CREATE TABLE updates (number INTEGER PRIMARY KEY, update_id TEXT NOT NULL UNIQUE, state TEXT NOT NULL,"
    " ended_at REAL, outcomes TEXT NOT NULL, record TEXT NOT NULL)",
    "CREATE INDEX updates_in_flight ON updates (number) WHERE ended_at IS NULL",
)
_OWNERS = (
    "CREATE TABLE owners (instance TEXT PRIMARY KEY, address TEXT NOT NULL UNIQUE, entry TEXT NOT NULL,"
    " expires_at REAL NOT NULL)",
    "CREATE TABLE offers (number INTEGER PRIMARY KEY, instance TEXT NOT NULL REFERENCES owners (instance)"
    " ON DELETE CASCADE, digest TEXT NOT NULL, label TEXT NOT NULL, offer BLOB NOT NULL, UNIQUE (instance, digest))",
    "CREATE TABLE membership (epoch INTEGER NOT NULL)",
    "INSERT INTO membership VALUES (0)",
)
# what each release of the schema added: a file of an older one gets the rest
_STEPS = (_FIRST, _OWNERS)
SCHEMA_VERSION = len(_STEPS)


class StoreFile:
    """The open file.

    Attributes:
        path: its name.
    """

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Open it, or make it.

        Args:
            path: the file; its directory is made 0700 if absent.
            timeout_s: how long to wait for other writers.

        Raises:
            ConfigError: others may read or write it, it is not a store, a later release made it, or SQLite refuses.
        """
        directory = own_directory(path.parent)
        self.path = directory / path.name
        self._lock = threading.RLock()
        with locked(directory, timeout_s=timeout_s):  # SQLite does not wait where two processes turn on the WAL
            _make_private(self.path)
            try:
                self._connection = self._connect(timeout_s)
            except sqlite3.Error as error:
                raise self._refused(error) from error

    def _connect(self, timeout_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            _check_journal(connection, self.path)
            # a killed process loses nothing; the power takes the engines, too, and a sync would be in every pause
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            _make_schema(connection, self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _refused(self, error: sqlite3.Error) -> ConfigError:
        return ConfigError(
            f"store {str(self.path)!r}: expected to read and write it, got {error}; check that it is open, that its disk has "
            "room, that no other process holds it, and that it is a store's file"
        )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements of the block or none; what they wrote is on the disk when it ends.

        Raises:
            ConfigError: SQLite refuses.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # a full disk may have ended it already
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._refused(error) from error

    def rows(self, query: str, *values: Any) -> list[Any]:
        """What a query gives.

        Raises:
            ConfigError: SQLite refuses.
        """
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._refused(error) from error

    def close(self) -> None:
        """Close it. Idempotent."""
        with self._lock:
            self._connection.close()


def _make_private(path: Path) -> None:
    """Make an empty file 0600, or check the one there is.

    An existing file is not opened here: closing it would drop the locks of another connection of this process.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"store {str(path)!r}: expected a file of mode 600 of uid {os.geteuid()}, got mode "
                f"{stat.S_IMODE(found.st_mode):o} of uid {found.st_uid}; chmod 600 it if it is yours"
            ) from None
    except OSError as error:
        raise ConfigError(f"store {str(path)!r}: cannot be made ({error.strerror}); name another directory") from error


def _check_journal(connection: sqlite3.Connection, path: Path) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ConfigError(
            f"store {str(path)!r}: expected a write-ahead log, got {mode}; name a directory on a local disk"
        )


def _make_schema(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > SCHEMA_VERSION:
        raise ConfigError(
            f"store {str(path)!r}: expected schema {SCHEMA_VERSION} or older, got {found}: a later release made it; "
            "use that one, or name another directory"
        )
    if found == SCHEMA_VERSION:
        return
    if not found and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
        raise ConfigError(f"store {str(path)!r}: expected a store, got another database; name another directory")
    connection.execute("BEGIN IMMEDIATE")
    for statement in (statement for step in _STEPS[found:] for statement in step):
        connection.execute(statement)
    if not found:
        connection.execute("INSERT INTO store VALUES (?)", (secrets.token_hex(16),))
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # part of the transaction: it stands in the header
    connection.execute("COMMIT")
