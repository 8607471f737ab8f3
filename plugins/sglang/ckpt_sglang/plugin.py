"""SGLang's plugin: each hook one call of the rank's adapter, or of the engine's control."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ckpt_core.capability import FULL, Capability, Level, Support, not_implemented, unsupported
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
from ckpt_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint
    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest
    from ckpt_sglang.rank import SglangRank

ENGINE = "sglang"
_CAPABILITIES: Mapping[Capability, Support] = {
    Capability.PARTIAL_UPDATE: FULL,
    Capability.RECORDED_LAYOUT: Support(level=Level.FULL, detail="not with a draft model"),
    Capability.QUANTIZED: not_implemented(
        "post-processing is called, but on CPUs SGLang quantises (fp8, w8a8_int8) with AMX only, so it was never run; "
        "refused on SGLang 0.5.17"
    ),
    Capability.DRAFT_MODEL: not_implemented(
        "loaded like the target, but draft models need kernels that the stand-in on CPUs lacks, so it was never run; "
        "refused on SGLang 0.5.17"
    ),
    Capability.TIED_WEIGHTS: FULL,
    Capability.LORA: unsupported("adapters are loaded by SGLang's own routes and stay as they are"),
    Capability.STABLE_ADDRESSES: FULL,
    Capability.SNAPSHOT: not_implemented("a second copy of the weights on the device; roll back by an update"),
    Capability.RELOADABLE_ABORT: FULL,
    Capability.LIVE_READ: FULL,
    Capability.PAUSE_ABORT: FULL,
    Capability.PAUSE_WAIT: FULL,
    Capability.PAUSE_KEEP: Support(
        level=Level.FULL,
        detail="as in_place; the cache stays stale, for later prompts too, until a flush after those requests",
    ),
    Capability.PAUSE_RETRACT: Support(level=Level.FULL, detail="SGLang 0.5.17: only without requests in flight"),
    Capability.FLUSH_CACHE: FULL,
    Capability.SLEEP: not_implemented(
        "ckpt_wake takes memory back, but the memory saver needs a GPU and was never run"
    ),
    Capability.POISON_GUARD: FULL,
    Capability.INITIAL_WEIGHTS: FULL,
    Capability.LIVE_VERSION: Support(
        level=Level.FULL,
        detail="SGLang 0.5.17 names one version an answer, that of its end, and has no weight_versions by token",
    ),
}


@hookimpl
def ckpt_engine_info() -> EngineInfo:
    """Names, versions, capabilities."""
    return EngineInfo(
        name=ENGINE,
        plugin_version=_version("ckpt-core") or "0",
        engine_version=_version("sglang"),
        capabilities=_CAPABILITIES,
    )


# -- in each rank process ------------------------------------------------------------
@hookimpl
def ckpt_identify(worker: SglangRank) -> RankInfo:
    """Who this rank is."""
    return worker.identify()


@hookimpl
def ckpt_supports(worker: SglangRank) -> None:
    """Models and states that cannot be updated in place."""
    from ckpt_sglang.support import check_supported

    check_supported(worker)


@hookimpl
def ckpt_layout(worker: SglangRank, manifest: Manifest) -> Layout:
    """Whole tensors that the loader takes, by a dry run of it; names, shapes and dtypes that do not fit."""
    return worker.layout(manifest)


@hookimpl
def ckpt_recording_target(worker: SglangRank) -> RecordingTarget | None:
    """A model without data, whose loader is the live one's."""
    return worker.recording_target()


@hookimpl
def ckpt_begin(worker: SglangRank, update: Update) -> None:
    """Nothing is written yet."""
    worker.begin(update)


@hookimpl
def ckpt_load(worker: SglangRank, update: Update, bucket: LoadBucket) -> LoadReport:
    """The engine's own loader."""
    return worker.load(update, bucket)


@hookimpl
def ckpt_finish(worker: SglangRank, update: Update) -> None:
    """Fixups, quantisation, device synchronised."""
    worker.finish(update)


@hookimpl
def ckpt_abort(worker: SglangRank, update: Update, cause: str) -> AbortOutcome:
    """UNTOUCHED or RELOADABLE."""
    return worker.abort(update)


@hookimpl
def ckpt_poison(worker: SglangRank, cause: str | None) -> None:
    """The guard of this rank."""
    worker.set_poison(cause)


@hookimpl
def ckpt_live(worker: SglangRank) -> Mapping[str, LiveTensor]:
    """Parameters and buffers."""
    return worker.live()


# -- on the control side ------------------------------------------------------------
@hookimpl
def ckpt_ready(endpoint: Endpoint) -> EndpointStatus:
    """GET /ckpt/status."""
    from ckpt_sglang.client import client_of

    return client_of(endpoint).status()


@hookimpl
def ckpt_attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """POST /update_weights_from_ipc: blocks until every rank is out."""
    from ckpt_sglang.client import client_of

    client_of(endpoint).attach(rendezvous)


@hookimpl
def ckpt_wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """POST /resume_memory_occupation."""
    from ckpt_sglang.client import client_of

    client_of(endpoint).wake(tags)


@hookimpl
def ckpt_pause(endpoint: Endpoint, mode: PauseMode) -> int:
    """POST /ckpt/pause."""
    from ckpt_sglang.client import client_of

    return client_of(endpoint).pause(mode)


@hookimpl
def ckpt_flush_cache(endpoint: Endpoint) -> None:
    """POST /flush_cache."""
    from ckpt_sglang.client import client_of

    client_of(endpoint).flush()


@hookimpl
def ckpt_resume(endpoint: Endpoint, version: str | None) -> None:
    """POST /ckpt/resume."""
    from ckpt_sglang.client import client_of

    client_of(endpoint).resume(version)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
