"""Which versions are warm on this host: used where they lie, or held in the pool, each tensor once.

A version of the pool is an index into several segments: what it shares with other versions is not stored again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt_core.errors import ConfigError, ManifestError
from ckpt_core.manifest import Manifest
from ckpt_core.owned import locked, try_locked
from ckpt_core.segment_copy import copy_tensors
from ckpt_core.segments import Segments
from ckpt_core.source import SourceFile, SourceIndex
from ckpt_core.store import Store
from ckpt_core.store_records import VersionRecord
from ckpt_core.tensor_places import Content, Place, content_of, index_from, pairs, places_of

_LOCK_TIMEOUT_S = 600.0  # as long as a copy of a large model by another process may take


class VersionPool:
    """The versions of a store, and the directory of those that are held in memory.

    What changes the directory is done by one process and thread at a time; looking up is free.
    """

    def __init__(self, store: Store, directory: Path, *, lock_timeout_s: float = _LOCK_TIMEOUT_S) -> None:
        """Open the pool of a store; removes what writers left that were killed.

        Args:
            store: says which versions there are.
            directory: a private one, normally on /dev/shm; made 0700 if absent.
            lock_timeout_s: how long to wait for others that change the pool.

        Raises:
            ConfigError: others may write into the directory, or it belongs to another store.
        """
        self._store = store
        self._segments = Segments(directory, store.identity)
        self._lock_timeout_s = lock_timeout_s
        self._reclaim_unless_busy()

    @property
    def directory(self) -> Path:
        """Where segments lie."""
        return self._segments.directory

    @property
    def size_bytes(self) -> int:
        """Memory that the pool holds now."""
        return self._segments.size_bytes()

    # -- looking up --------------------------------------------------------------------------------------------
    def versions(self) -> tuple[VersionRecord, ...]:
        """All versions, warm or cold, newest first."""
        return self._store.versions()

    def find(self, name: str) -> VersionRecord:
        """See Store.version."""
        return self._store.version(name)

    def warm(self, record: VersionRecord) -> bool:
        """Whether the bytes of a version are still where its index says, unchanged."""
        with suppress(ManifestError):
            self._segments.check(record.index)
            return True
        return False

    def index_of(self, name: str) -> SourceIndex:
        """Where the bytes of a version are; counts as a use of it.

        Raises:
            ConfigError: there is no such version, or it is cold.
        """
        record = self.find(name)
        try:
            self._segments.check(record.index)
        except ManifestError as error:
            gone = next((file.path for file in record.index.files if not _is_unchanged(file)), "of it")
            raise ConfigError(
                f"version {record.label or record.digest!r:.200} is cold: file {gone!r} changed or is gone; adopt or update "
                "from another copy"
            ) from error
        self._store.touch_version(record.digest)
        return record.index

    # -- adding ------------------------------------------------------------------------------------------------
    def keep(self, index: SourceIndex, manifest: Manifest, label: str) -> VersionRecord:
        """Take a version in files, where they lie. One that the pool holds already stays there.

        Raises:
            ManifestError: a file changed since it was opened, or index and manifest do not fit.
            ConfigError: the label is bound to another version, or a file lies in the pool.
        """
        self._check(index, manifest)
        for file in index.files:
            if self._segments.holds(file.path):
                raise ConfigError(f"{file.path!r}: expected a file outside the pool, got one in it; use own for it")
        with self._changing():
            held = self._held(manifest)
            return self._register(held.index if held else index, manifest, label)

    def store_copy(self, index: SourceIndex, manifest: Manifest, label: str) -> VersionRecord:
        """Copy a version into the pool: only tensors that no version there has.

        Raises:
            VerificationError: the bytes are not the manifest's.
            ManifestError: a file changed since it was opened, or index and manifest do not fit.
            CapacityError: there is no room for it.
            ConfigError: the label is bound to another version.
        """
        self._check(index, manifest)
        with self._changing():
            self._store.check_label(label, manifest.digest)
            places = self._places()
            missing = {content_of(meta): extent for meta, extent in pairs(index, manifest)}
            missing = {content: extent for content, extent in missing.items() if content not in places}
            if missing:
                places |= copy_tensors(index, missing, self._segments.new_path())
                index.check()
            return self._register(index_from(manifest, places), manifest, label)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory of the pool to stage tensors in; what is not owned by the end of the block is removed."""
        try:
            with self._segments.staging() as directory:
                yield directory
        finally:
            self._reclaim_unless_busy()

    def own(self, index: SourceIndex, manifest: Manifest, label: str) -> VersionRecord:
        """Take over files that were staged in a directory of `staging`; nobody may write them any more.

        Tensors that other versions of the pool have are pointed there, and their pages are given back.

        Raises:
            ManifestError: a file changed since it was opened, or index and manifest do not fit.
            ConfigError: the label is bound to another version, or a file is not of `staging`.
        """
        self._check(index, manifest)
        for file in index.files:
            if not self._segments.is_staged(file.path):
                raise ConfigError(
                    f"{file.path!r}: expected a file in a directory of staging() of the pool {str(self.directory)!r}, got "
                    "one elsewhere; stage it there, or copy it with store_copy"
                )
        with self._changing():
            places = self._places()
            for meta, extent in pairs(index, manifest):
                places.setdefault(content_of(meta), (index.files[extent.file], extent))
            return self._register(index_from(manifest, places), manifest, label)

    # -- dropping ----------------------------------------------------------------------------------------------
    def evict(self, keep: int, budget_bytes: int, protect: Collection[str]) -> tuple[VersionRecord, ...]:
        """Drop the versions used longest ago, cold ones first, until the rest is within both bounds.

        Versions in files cost no bytes: the budget drops none of them. What several versions share counts once.

        Args:
            keep: how many versions may stay.
            budget_bytes: how much memory of the pool they may hold.
            protect: digests of versions that stay whatever the bounds are.

        Returns:
            What was dropped.
        """
        with self._changing():
            dropped = self._drop(keep, budget_bytes, protect)
            could_punch = self._segments.can_punch
            self._reclaim()
            if could_punch and not self._segments.can_punch:  # holes were counted as given back
                dropped += self._drop(keep, budget_bytes, protect)
            return dropped

    def _drop(self, keep: int, budget_bytes: int, protect: Collection[str]) -> tuple[VersionRecord, ...]:
        records = sorted(self.versions(), key=lambda record: (self.warm(record), record.used_at), reverse=True)
        staying = [record for record in records if record.digest in protect]
        dropped = []
        needed = self._needed_bytes(staying)
        for record in (record for record in records if record.digest not in protect):
            more = self._needed_bytes([*staying, record])
            if len(staying) < keep and (more <= budget_bytes or more == needed):
                staying.append(record)
                needed = more
            else:
                budget_bytes = min(budget_bytes, needed)  # none older is kept instead of a newer one
                dropped.append(record)
        for record in dropped:
            self._store.forget_version(record.digest)
        return tuple(dropped)

    def _needed_bytes(self, records: Iterable[VersionRecord]) -> int:
        return self._segments.needed_bytes(record.index for record in records)

    # -- inside ------------------------------------------------------------------------------------------------
    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone, and with nothing left behind, however it ends."""
        with locked(self.directory, timeout_s=self._lock_timeout_s):
            try:
                yield
            finally:
                self._reclaim()

    def _reclaim(self) -> None:
        self._segments.reclaim(record.index for record in self.versions())

    def _reclaim_unless_busy(self) -> None:
        """Whoever is changing the pool gives back the rest, or the next who opens it."""
        with try_locked(self.directory) as alone:
            if alone:
                self._reclaim()

    def _check(self, index: SourceIndex, manifest: Manifest) -> None:
        if not index.in_files:
            raise ManifestError(
                "expected a version in files, got one in device memory or on other hosts, which ends with its process; stage it"
            )
        if len(index.extents) != len(manifest.tensors) or any(
            (extent.name, extent.dtype, extent.shape) != (meta.name, meta.dtype, meta.shape)
            for meta, extent in pairs(index, manifest)
        ):
            raise ManifestError("expected index and manifest of one checkpoint, got other names, dtypes or shapes")
        index.check()

    def _held(self, manifest: Manifest) -> VersionRecord | None:
        """The same version, if it is warm in the pool."""
        for record in self.versions():
            if record.digest == manifest.digest and self.warm(record):
                return record if any(self._segments.holds(file.path) for file in record.index.files) else None
        return None

    def _register(self, index: SourceIndex, manifest: Manifest, label: str) -> VersionRecord:
        self._store.put_version(VersionRecord.of(index, manifest, label))
        return self.find(manifest.digest)

    def _places(self) -> dict[Content, Place]:
        """Where the pool has what."""
        warm = filter(self.warm, self.versions())
        return places_of(((record.index, record.manifest) for record in warm), self._segments.holds)


def _is_unchanged(file: SourceFile) -> bool:
    with suppress(ManifestError):
        file.check()
        return True
    return False
