"""What this host's controllers remember: versions that are still warm, what each engine runs, and updates in flight."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ckpt_core.config import Environment, UpdateConfig
from ckpt_core.content import Content
from ckpt_core.errors import CkptError, ConfigError, Outcome
from ckpt_core.manifest import Manifest
from ckpt_core.process import ProcessMark
from ckpt_core.states import SessionState
from ckpt_core.store import Store
from ckpt_core.store_records import EngineRecord, UpdateEndpoint, UpdateRecord, VersionRecord
from ckpt_core.version_pool import VersionPool

_log = logging.getLogger(__name__)
_MANY = 1000
_NO_LIMIT = 1 << 62


class History:
    """See the module.

    Args:
        state: directory of the store.
        pool: directory of what is held in memory.
    """

    def __init__(self, state: Path, pool: Path) -> None:
        self.store = Store(state)
        self._pool_directory = pool
        self._opened: VersionPool | None = None

    @classmethod
    def of(cls, environment: Environment, ephemeral: Path | None = None) -> History:
        """That of this user and host; one that ends with the process, in that directory, where there is no place to keep it.

        Raises:
            ConfigError: there is no place for either.
        """
        state = environment.state_root
        if state is None and ephemeral is None:
            raise ConfigError("nothing is remembered here; set CKPT_STATE_DIR to a directory of yours")
        if state is not None:
            return cls(state, pool_directory(environment.memory_root, state))
        assert ephemeral is not None
        return cls(ephemeral / "state", ephemeral / "versions")

    @property
    def pool(self) -> VersionPool:
        """What is warm."""
        if self._opened is None:
            self._opened = VersionPool(self.store, self._pool_directory)
        return self._opened

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    # -- engines -----------------------------------------------------------------------------------------------
    def ran(self, url: str, instance_id: str) -> EngineRecord | None:
        """What that life of an engine runs; None where nobody knows."""
        record = self.store.engine(url)
        same = record is not None and bool(instance_id) and record.instance_id == instance_id
        return record if same else None

    def runs(self, records: Iterable[EngineRecord]) -> None:
        """Engines run this now."""
        for record in records:
            self.store.put_engine(record)

    def find(self, name: str, *, not_running: Collection[EngineRecord | None]) -> VersionRecord:
        """A version by name; for "" the warm one used last that none of those engines runs.

        Raises:
            ConfigError: there is none.
        """
        if name:
            return self.pool.find(name)
        running = {record.digest for record in not_running if record is not None}
        committed = {
            update.new_digest for update in self.store.updates(_MANY) if update.state == Outcome.COMMITTED.value
        }
        for record in sorted(self.pool.versions(), key=lambda record: record.used_at, reverse=True):
            if record.digest in committed - running and self.pool.warm(record):
                return record
        raise ConfigError("no version is warm but those that the engines run; `ckpt versions` lists them")

    def warm(self, digest: str) -> VersionRecord | None:
        """A version whose bytes are still there."""
        with suppress(ConfigError):
            record = self.pool.find(digest)
            if record.digest == digest and self.pool.warm(record):
                return record
        return None

    # -- updates -----------------------------------------------------------------------------------------------
    def begin(self, update_id: str, endpoints: Sequence[UpdateEndpoint], content: Content, version: str) -> None:
        """An update is about to pause engines. Where its bytes are is known from now on: whoever comes later can finish it.

        Raises:
            ConfigError: the label is bound to another version.
        """
        if content.manifest.has_content:
            self._check_label(version, content.manifest)
            if content.index.in_files:
                self.pool.keep(content.index, content.manifest, version)
        self._write_begin(update_id, endpoints, content, version)

    def _write_begin(self, update_id: str, endpoints: Sequence[UpdateEndpoint], content: Content, version: str) -> None:
        self.store.begin_update(
            UpdateRecord(
                update_id=update_id,
                state=SessionState.PLANNED.value,
                controller=ProcessMark.here(),
                endpoints=tuple(endpoints),
                new_digest=content.digest,
                version=version,
                started_at=time.time(),
            )
        )

    def _check_label(self, label: str, manifest: Manifest) -> None:
        """A label is bound to its content as long as that is warm; another model may have a version of that name."""
        try:
            self.store.check_label(label, manifest.digest)
        except ConfigError:
            other = self.store.version(label)
            if other.manifest.structure_digest == manifest.structure_digest and self.pool.warm(other):
                raise
            self.store.release_label(label)

    def committed(
        self, update_id: str, engines: Sequence[EngineRecord], content: Content, config: UpdateConfig
    ) -> None:
        """Engines run this now, and serve; its bytes stay warm, those of older versions as the configuration says."""
        if self._is_open(update_id):  # else it was interrupted right behind this
            self.store.commit_update(update_id, engines)
        self._supersede({record.url for record in engines})
        try:
            if config.copy_to_pool and content.manifest.has_content and content.index.in_files:
                self.pool.store_copy(content.index, content.manifest, engines[0].version)
            self.pool.evict(config.keep_versions, config.pool_bytes or _NO_LIMIT, self.store.digests_in_use())
        except CkptError as error:
            _log.warning("version %s is committed, but older ones could not be let go: %s", engines[0].version, error)

    def adopted(self, engines: Sequence[EngineRecord], content: Content, *, copy: bool) -> None:
        """Engines run this already: kept warm, and written down as an update that ended committed.

        Raises:
            ConfigError: the label is bound to another version.
            CapacityError: there is no room for a copy.
        """
        first = engines[0]
        (self.pool.store_copy if copy else self.pool.keep)(content.index, content.manifest, first.version)
        endpoints = [
            UpdateEndpoint(url=record.url, engine=record.engine, instance_id=record.instance_id) for record in engines
        ]
        self._write_begin(first.update_id, endpoints, content, first.version)
        self.store.commit_update(first.update_id, engines)

    def _supersede(self, urls: Collection[str]) -> None:
        """What others, who are not there any more, left of these engines is over: whoever updates them has their locks."""
        for update in self.store.in_flight():
            if all(endpoint.url in urls for endpoint in update.endpoints):
                self.store.end_update(update.update_id, {})

    def aborted(self, update_id: str, outcomes: Mapping[str, Outcome]) -> None:
        """An update ended so, if it had begun."""
        if self._is_open(update_id):
            self.store.end_update(update_id, outcomes)

    def _is_open(self, update_id: str) -> bool:
        return any(update.update_id == update_id for update in self.store.in_flight())

    def left_behind(self) -> tuple[UpdateRecord, ...]:
        """Updates in flight whose controller is gone."""
        return tuple(update for update in self.store.in_flight() if update.controller.is_gone())


def pool_directory(memory_root: Path, state: Path) -> Path:
    """Where versions of a store are held in memory."""
    return memory_root / f"ckpt-versions-{hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:12]}"
