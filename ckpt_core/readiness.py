"""Which engines may get requests, and which versions there are, as far as anybody remembers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec

from ckpt_core.contract import EndpointState, EndpointStatus
from ckpt_core.history import History
from ckpt_core.store_records import EngineRecord


def not_ready(statuses: Mapping[str, EndpointStatus], known: Mapping[str, EngineRecord | None]) -> dict[str, str]:
    """Why engines may get no requests, by URL: they do not serve, or not what was committed to all of them.

    Args:
        known: by URL: the last commit; nothing where nobody remembers any.
    """
    reasons: dict[str, str] = {}
    newest = max((record for record in known.values() if record), key=lambda record: record.committed_at, default=None)
    for url, status in statuses.items():
        record = known.get(url)
        if status.state is not EndpointState.SERVING:
            reasons[url] = f"{status.state.value} {status.detail}".strip()
        elif record is not None and status.instance_id and record.instance_id != status.instance_id:
            reasons[url] = f"restarted since {record.version} was committed to it; update it"
        elif newest is not None and (record is None or record.digest != newest.digest):
            held = "nobody knows what" if record is None else record.version
            reasons[url] = f"runs {held}, the others {newest.version}; update it"
    return reasons


class VersionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One version, for people and machines."""

    digest: str
    label: str
    size_bytes: int
    tensors: int
    warm: bool
    where: str
    used_at: str
    engines: tuple[str, ...]


def version_rows(history: History) -> list[VersionRow]:
    """All versions, newest first."""
    engines = history.store.engines()
    return [
        VersionRow(
            digest=record.digest,
            label=record.label,
            size_bytes=record.size_bytes,
            tensors=record.tensors,
            warm=history.pool.warm(record),
            where=", ".join(sorted({file.path.rpartition("/")[0] for file in record.index.files})),
            used_at=datetime.fromtimestamp(record.used_at, UTC).isoformat(timespec="seconds"),
            engines=tuple(engine.url for engine in engines if engine.digest == record.digest),
        )
        for record in history.pool.versions()
    ]
