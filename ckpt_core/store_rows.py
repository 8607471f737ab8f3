"""Records as rows of the store's tables, and back."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from ckpt_core.errors import Outcome
from ckpt_core.manifest import Manifest
from ckpt_core.source import SourceIndex
from ckpt_core.store_records import UpdateRecord, VersionRecord


def version_row(record: VersionRecord) -> dict[str, str | bytes | int | float]:
    """Columns of a version."""
    return {
        "digest": record.digest,
        "label": record.label,
        "size_bytes": record.size_bytes,
        "tensors": record.tensors,
        "manifest": zlib.compress(record.manifest.to_json(), 1),  # mostly digests: more effort gains nothing
        "source": msgspec.json.encode(record.index).decode(),
        "created_at": record.created_at,
        "used_at": record.used_at,
    }


def version_of(digest: str, label: str, manifest: bytes, source: str, *times: float) -> VersionRecord:
    """A version from its columns; `times` are created_at and used_at."""
    created_at, used_at = times
    return VersionRecord(
        digest=digest,
        label=label,
        manifest=_manifest(manifest),
        index=_index(source),
        created_at=created_at,
        used_at=used_at,
    )


@lru_cache(maxsize=16)  # they never change, and listing versions would read all of them again each time
def _manifest(packed: bytes) -> Manifest:
    return Manifest.from_json(zlib.decompress(packed))


@lru_cache(maxsize=16)
def _index(source: str) -> SourceIndex:
    return msgspec.json.decode(source, type=SourceIndex)


def outcomes_json(outcomes: Mapping[str, Outcome]) -> str:
    """Column of outcomes by url."""
    return msgspec.json.encode(dict(outcomes)).decode()


def update_of(record: str, state: str, ended_at: float | None, outcomes: str) -> UpdateRecord:
    """An update as it began, with what became of it since."""
    return msgspec.structs.replace(
        msgspec.json.decode(record, type=UpdateRecord),
        state=state,
        ended_at=ended_at,
        outcomes=msgspec.json.decode(outcomes, type=dict[str, Outcome]),
    )
