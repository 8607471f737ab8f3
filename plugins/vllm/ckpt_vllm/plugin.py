"""The hooks: each one call of the worker's adapter, or of the control side. Imports neither vLLM nor torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ckpt_core.capability import FULL, Capability, Level, Support, not_implemented, unsupported, versioned
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
from ckpt_vllm import compat, control

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint
    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest
    from ckpt_vllm.adapter import CkptWorker

_log = logging.getLogger(__name__)
ENGINE = control.ENGINE
_CAPABILITIES: Mapping[Capability, Support] = {
    Capability.PARTIAL_UPDATE: Support(level=Level.FULL, detail="whole modules where vLLM repacks or quantises"),
    Capability.RECORDED_LAYOUT: Support(
        level=Level.FULL, detail="models that are loaded directly, without a draft model in their checkpoint"
    ),
    Capability.QUANTIZED: Support(
        level=Level.FULL, detail="run with FP8 per channel, quantised by vLLM from BF16; see the README"
    ),
    Capability.DRAFT_MODEL: not_implemented("MTP drafts are loaded in the same step; not run yet"),
    Capability.TIED_WEIGHTS: FULL,
    Capability.LORA: unsupported("vLLM cannot load a checkpoint in place into layers that are wrapped for LoRA"),
    Capability.STABLE_ADDRESSES: Support(
        level=Level.FULL, detail="but for weights that CPU kernels pack, and over sleep"
    ),
    Capability.SNAPSHOT: not_implemented("it would double the memory of the weights"),
    Capability.RELOADABLE_ABORT: FULL,
    Capability.LIVE_READ: Support(level=Level.FULL, detail="weights that CPU kernels packed are not reachable"),
    Capability.PAUSE_ABORT: FULL,
    Capability.PAUSE_WAIT: FULL,
    Capability.PAUSE_KEEP: FULL,
    Capability.PAUSE_RETRACT: FULL,
    Capability.FLUSH_CACHE: FULL,
    Capability.SLEEP: not_implemented(
        "weights woken, updated, cache woken: run on GPUs; but woken from level 2 and not updated it would serve whatever is there"
    ),
    Capability.POISON_GUARD: FULL,
    Capability.INITIAL_WEIGHTS: FULL,
    Capability.LIVE_VERSION: versioned("0.32.0 on responses; ckpt ready tells it with every version"),
}


@hookimpl
def ckpt_engine_info() -> EngineInfo:
    """Names, versions, capabilities."""
    installed = compat.engine_version()
    if warning := compat.version_warning(installed):
        _log.warning("%s", warning)
    try:
        own = version("ckpt-core")
    except PackageNotFoundError:
        own = "0"
    return EngineInfo(name=ENGINE, plugin_version=own, engine_version=installed, capabilities=_CAPABILITIES)


# -- in each rank process ------------------------------------------------------------
@hookimpl
def ckpt_identify(worker: CkptWorker) -> RankInfo:
    """Who this rank is."""
    return worker.identify()


@hookimpl
def ckpt_supports(worker: CkptWorker) -> None:
    """Not with LoRA, not asleep, not while it serves."""
    worker.check_updatable()


@hookimpl
def ckpt_layout(worker: CkptWorker, manifest: Manifest) -> Layout:
    """Whole tensors, by module; names, shapes and dtypes compared with the model's."""
    return worker.layout(manifest)


@hookimpl
def ckpt_recording_target(worker: CkptWorker) -> RecordingTarget | None:
    """The live model, where it is loaded directly."""
    return worker.recording_target()


@hookimpl
def ckpt_begin(worker: CkptWorker, update: Update) -> None:
    """Choose a way, and make parameters loadable."""
    worker.begin(update)


@hookimpl
def ckpt_load(worker: CkptWorker, update: Update, bucket: LoadBucket) -> LoadReport:
    """Through the model's own loader."""
    return worker.load(update, bucket)


@hookimpl
def ckpt_finish(worker: CkptWorker, update: Update) -> None:
    """Process what is not complete; synchronise the device."""
    worker.finish(update)


@hookimpl
def ckpt_abort(worker: CkptWorker, update: Update, cause: str) -> AbortOutcome:
    """UNTOUCHED or RELOADABLE."""
    return worker.abort()


@hookimpl
def ckpt_poison(worker: CkptWorker, cause: str | None) -> None:
    """See `ckpt_vllm.guard`."""
    worker.set_poison(cause)


@hookimpl
def ckpt_live(worker: CkptWorker) -> Mapping[str, LiveTensor]:
    """Parameters and persistent buffers."""
    return worker.live()


# -- on the control side -------------------------------------------------------------
@hookimpl
def ckpt_ready(endpoint: Endpoint) -> EndpointStatus:
    """What it is, does, and by which road an update would enter."""
    return _side(endpoint).ready(endpoint)


@hookimpl
def ckpt_attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """One blocking call."""
    _side(endpoint).attach(endpoint, rendezvous)


@hookimpl
def ckpt_wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """By tags."""
    _side(endpoint).wake(endpoint, tags)


@hookimpl
def ckpt_pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """Returns once no step runs."""
    count: int | None = _side(endpoint).pause(endpoint, mode)
    return count


@hookimpl
def ckpt_flush_cache(endpoint: Endpoint) -> None:
    """Prefix, multimodal and encoder caches."""
    _side(endpoint).flush_cache(endpoint)


@hookimpl
def ckpt_resume(endpoint: Endpoint, version: str | None) -> None:
    """Refused by vLLM's engine core while a rank is poisoned."""
    _side(endpoint).resume(endpoint, version)


def _side(endpoint: Endpoint) -> Any:
    """Where the calls of this endpoint go: a server, or an engine object in this process."""
    if endpoint.handle is None:
        return control
    from ckpt_vllm import in_process

    return in_process
