"""TensorRT-LLM's plugin: each hook one call of the rank, or of the engine's handle. Imports neither TensorRT-LLM nor torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ckpt_core.capability import Capability, Level, Support, not_implemented, versioned
from ckpt_core.contract import (
    AbortOutcome,
    EndpointStatus,
    EngineInfo,
    LiveTensor,
    LoadBucket,
    LoadReport,
    PauseMode,
    RankInfo,
    Rendezvous,
    Update,
)
from ckpt_core.hookspecs import hookimpl
from ckpt_trtllm import compat
from ckpt_trtllm.calls import ENGINE

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint
    from ckpt_core.layout import Layout
    from ckpt_core.manifest import Manifest
    from ckpt_trtllm.rank import TrtllmRank

_log = logging.getLogger(__name__)
_STAND_IN = "on a stand-in only, never on the engine"


def _on_stand_in(detail: str = "") -> Support:
    return Support(level=Level.FULL, detail=f"{_STAND_IN}; {detail}" if detail else _STAND_IN)


_CAPABILITIES: Mapping[Capability, Support] = {
    Capability.PARTIAL_UPDATE: _on_stand_in("whole modules where TensorRT-LLM rebuilds them"),
    Capability.RECORDED_LAYOUT: not_implemented("its loaders were never recorded: every rank takes whole tensors"),
    Capability.QUANTIZED: _on_stand_in("a toy quantisation, none of the engine's own"),
    Capability.DRAFT_MODEL: not_implemented("refused: rebuilding would destroy the weights of a draft model"),
    Capability.TIED_WEIGHTS: _on_stand_in(),
    Capability.LORA: not_implemented("refused: never tried"),
    Capability.STABLE_ADDRESSES: _on_stand_in("what is rebuilt is in memory twice during an update"),
    Capability.SNAPSHOT: not_implemented("a second copy of the weights on the device; roll back by an update"),
    Capability.RELOADABLE_ABORT: _on_stand_in("by a whole checkpoint"),
    Capability.LIVE_READ: _on_stand_in("parameters and buffers; what modules derive beside them is not reachable"),
    Capability.PAUSE_ABORT: versioned(f"{_STAND_IN}; engines that can abort all requests"),
    Capability.PAUSE_WAIT: _on_stand_in(),
    Capability.PAUSE_KEEP: not_implemented("newer engines can park with requests in flight; their cache stays stale"),
    Capability.PAUSE_RETRACT: not_implemented("newer engines can compute requests again; never tried"),
    Capability.FLUSH_CACHE: _on_stand_in(),
    Capability.SLEEP: not_implemented("released memory is not seen: wake it before an update"),
    Capability.POISON_GUARD: _on_stand_in("the executor stays parked, and the forward pass raises"),
    Capability.INITIAL_WEIGHTS: _on_stand_in("WaitingWorkerExtension"),
    Capability.LIVE_VERSION: _on_stand_in("ckpt_ready tells it; responses carry none"),
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
def ckpt_identify(worker: TrtllmRank) -> RankInfo:
    """Who this rank is."""
    return worker.identity.info()


@hookimpl
def ckpt_supports(worker: TrtllmRank) -> None:
    """Models and states that cannot be updated in place."""
    worker.check_updatable()


@hookimpl
def ckpt_layout(worker: TrtllmRank, manifest: Manifest) -> Layout:
    """Whole tensors by module; compared with the files that the engine was started from."""
    return worker.layout(manifest)


@hookimpl
def ckpt_begin(worker: TrtllmRank, update: Update) -> None:
    """Nothing is written yet."""
    worker.begin(update)


@hookimpl
def ckpt_load(worker: TrtllmRank, update: Update, bucket: LoadBucket) -> LoadReport:
    """The engine's own loader."""
    return worker.load(update, bucket)


@hookimpl
def ckpt_finish(worker: TrtllmRank, update: Update) -> None:
    """Processing, balancer, caches; device synchronised."""
    worker.finish(update)


@hookimpl
def ckpt_abort(worker: TrtllmRank, update: Update, cause: str) -> AbortOutcome:
    """UNTOUCHED or RELOADABLE."""
    return worker.abort(update, cause)


@hookimpl
def ckpt_poison(worker: TrtllmRank, cause: str | None) -> None:
    """See `ckpt_trtllm.guard`."""
    worker.set_poison(cause)


@hookimpl
def ckpt_live(worker: TrtllmRank) -> Mapping[str, LiveTensor]:
    """Parameters and buffers."""
    return worker.live()


# -- on the control side -------------------------------------------------------------
@hookimpl
def ckpt_ready(endpoint: Endpoint) -> EndpointStatus:
    """What all ranks say of themselves."""
    from ckpt_trtllm import control

    return control.ready(endpoint)


@hookimpl
def ckpt_attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """One call of every rank, which blocks until all are out."""
    from ckpt_trtllm import control

    control.attach(endpoint, rendezvous)


@hookimpl
def ckpt_pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """Park every rank's executor."""
    from ckpt_trtllm import control

    return control.pause(endpoint, mode)


@hookimpl
def ckpt_flush_cache(endpoint: Endpoint) -> None:
    """Drop cached prefixes on every rank."""
    from ckpt_trtllm import control

    control.flush_cache(endpoint)


@hookimpl
def ckpt_resume(endpoint: Endpoint, version: str | None) -> None:
    """Serve again, unless any rank may not."""
    from ckpt_trtllm import control

    control.resume(endpoint, version)
