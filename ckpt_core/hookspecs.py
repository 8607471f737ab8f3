"""The contract between the core and an engine plugin: signatures, and when each hook is called.

A plugin is a module (or object) whose functions carry `@hookimpl` and these names. All hooks return the first
result. Raising is the only way to report a failure. Rules that hold for every hook stand in docs/guides/plugin.md
and each is a conformance check. Hooks marked *required* must exist; the others have a default or are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from ckpt_core.contract import (
    AbortOutcome,
    EndpointStatus,
    EngineInfo,
    LiveTensor,
    LoadBucket,
    LoadReport,
    PauseMode,
    RankInfo,
    RecordingTarget,
    Rendezvous,
    Update,
)

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint
    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest

PROJECT = "ckpt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

REQUIRED = frozenset(
    {
        "ckpt_engine_info",
        "ckpt_identify",
        "ckpt_begin",
        "ckpt_load",
        "ckpt_finish",
        "ckpt_abort",
        "ckpt_ready",
        "ckpt_attach",
    }
)


# -- in any process ------------------------------------------------------------------------------------------------
@hookspec(firstresult=True)
def ckpt_engine_info() -> EngineInfo:  # type: ignore[empty-body]
    """*Required.* Names, versions, capabilities. Called at load; must not import the engine."""


# -- in each rank process of the engine, in this order -------------------------------------------------------------
@hookspec(firstresult=True)
def ckpt_identify(worker: Any) -> RankInfo:  # type: ignore[empty-body]
    """*Required.* Who this rank is. Once per attach, first."""


@hookspec(firstresult=True)
def ckpt_supports(worker: Any) -> None:
    """Raise where this model or state cannot be updated in place (asleep, poisoned beyond repair, the engine's own
    guards). Once per attach, before anything is touched."""


@hookspec(firstresult=True)
def ckpt_layout(worker: Any, manifest: Manifest) -> Layout | None:
    """Slices of the checkpoint that this rank needs; names it misses, does not know, or expects otherwise.

    Once per manifest structure; touches nothing. None (or no hook): every tensor, whole.
    """


@hookspec(firstresult=True)
def ckpt_recording_target(worker: Any) -> RecordingTarget | None:
    """A model without data to record the engine's own loader on."""


@hookspec(firstresult=True)
def ckpt_snapshot(worker: Any, update: Update) -> Any:
    """Copy of this rank's live weights, before begin. Needs Capability.SNAPSHOT."""


@hookspec(firstresult=True)
def ckpt_begin(worker: Any, update: Update) -> None:
    """*Required.* Make parameters loadable. After every rank agreed on the plan.

    On an updating, asleep or unready worker: raise EngineStateError and change nothing.
    """


@hookspec(firstresult=True)
def ckpt_load(worker: Any, update: Update, bucket: LoadBucket) -> LoadReport:  # type: ignore[empty-body]
    """*Required.* Load the tensors of one bucket. Same order on every rank. Tensors are views valid until return.

    Not to be written to: other ranks read the same memory. Outside an update: raise EngineStateError.
    """


@hookspec(firstresult=True)
def ckpt_finish(worker: Any, update: Update) -> None:
    """*Required.* After the last bucket: quantisation, post-load, derived tensors. The device is synchronised before
    it returns. Raises where an expected tensor did not arrive."""


@hookspec(firstresult=True)
def ckpt_abort(worker: Any, update: Update, cause: str) -> AbortOutcome:  # type: ignore[empty-body]
    """*Required.* Any failure from begin on. Idempotent; may come in any state; begin works after it."""


@hookspec(firstresult=True)
def ckpt_restore(worker: Any, update: Update, snapshot: Any) -> None:
    """Write a snapshot back, after abort. Needs Capability.SNAPSHOT."""


@hookspec(firstresult=True)
def ckpt_poison(worker: Any, cause: str | None) -> None:
    """Arm (text) or disarm (None) a guard in the worker: while armed no token is produced, whoever resumes it.

    Disarmed only after a commit or a verified restore: begin, finish and abort leave it alone. There is no other word of a
    commit to the rank: None after a finished update is it.
    """


@hookspec(firstresult=True)
def ckpt_live(worker: Any) -> Mapping[str, LiveTensor] | None:
    """Live parameters, buffers and derived tensors by name: the storage itself, not copies."""


# -- on the control side -------------------------------------------------------------------------------------------
@hookspec(firstresult=True)
def ckpt_ready(endpoint: Endpoint) -> EndpointStatus:  # type: ignore[empty-body]
    """*Required.* What the engine at this endpoint is and does. Raises EngineUnavailable where nothing answers."""


@hookspec(firstresult=True)
def ckpt_attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """*Required.* Make every rank call `ckpt_core.worker.attach` with this rendezvous. Blocks until they are out.

    Outcomes travel on the update's own socket.
    """


@hookspec(firstresult=True)
def ckpt_wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """Bring memory back ("weights", "kv_cache")."""


@hookspec(firstresult=True)
def ckpt_pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """Stop producing tokens; returns once no step runs.

    Returns the number of requests in flight, or None if not known: those that the pause met (abort, wait), those that go on
    after it (keep, in_place, retract).
    """


@hookspec(firstresult=True)
def ckpt_flush_cache(endpoint: Endpoint) -> None:
    """Drop the KV and prefix caches. Raises where it could not."""


@hookspec(firstresult=True)
def ckpt_resume(endpoint: Endpoint, version: str | None) -> None:
    """Serve again; with a version, as that version."""
