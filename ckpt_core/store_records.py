"""What the store keeps: versions of a model, what each engine runs, and updates in flight or done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from ckpt_core.errors import Outcome
from ckpt_core.manifest import Manifest
from ckpt_core.process import ProcessMark
from ckpt_core.source import SourceIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """One version of a model.

    Attributes:
        digest: of its content: the manifest's.
        label: its last name, "" where it never had one. Older names find it too.
        manifest: names, shapes, dtypes, digests.
        index: where its bytes are.
        created_at, used_at: unix seconds.
    """

    digest: str
    label: str
    manifest: Manifest = field(repr=False)
    index: SourceIndex = field(repr=False)
    created_at: float
    used_at: float

    @classmethod
    def of(cls, index: SourceIndex, manifest: Manifest, label: str) -> VersionRecord:
        """The record of a version that is new now.

        Raises:
            ManifestError: a content digest is missing.
        """
        now = time.time()
        return cls(digest=manifest.digest, label=label, manifest=manifest, index=index, created_at=now, used_at=now)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.manifest.size_bytes

    @property
    def tensors(self) -> int:
        """How many there are."""
        return len(self.manifest.tensors)


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine runs since its last commit.

    Attributes:
        url, engine, instance_id: which engine, and which life of it.
        digest, version: of the weights, and their label.
        update_id: the update that committed them.
        fingerprints: of the live weights, by rank; empty where none were made.
        committed_at: unix seconds.
    """

    url: str
    engine: str
    instance_id: str
    digest: str
    version: str
    update_id: str
    fingerprints: tuple[str, ...] = ()
    committed_at: float


class UpdateEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that an update changes; `old_digest` is what it ran before, "" where that is not known."""

    url: str
    engine: str
    instance_id: str
    old_digest: str = ""


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One update.

    Attributes:
        update_id: its name.
        state: what it was doing last.
        controller: the process that leads it: whoever comes later can tell whether that is gone.
        endpoints: the engines.
        new_digest, version: of the weights they are to run, and their label.
        started_at, ended_at: unix seconds; no end while it is in flight.
        outcomes: by url, once it ended.
    """

    update_id: str
    state: str
    controller: ProcessMark
    endpoints: tuple[UpdateEndpoint, ...]
    new_digest: str
    version: str
    started_at: float
    ended_at: float | None = None
    outcomes: dict[str, Outcome] = {}
