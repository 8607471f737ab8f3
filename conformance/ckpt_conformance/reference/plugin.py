"""The reference engine's plugin: each hook one call of the worker, or of the server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ckpt_core.capability import FULL, Capability, Level, Support, not_implemented
from ckpt_core.contract import (
    AbortOutcome,
    DeviceKind,
    EndpointState,
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
from ckpt_core.errors import EngineUnavailable
from ckpt_core.hookspecs import hookimpl
from ckpt_core.layout import Layout, LayoutEntry, Mismatch

if TYPE_CHECKING:
    import httpx

    from ckpt_conformance.reference.worker import Snapshot, Worker
    from ckpt_core.endpoint import Endpoint
    from ckpt_core.manifest import Manifest

ENGINE = "reference"

_NO_LORA = not_implemented("the engine has no adapters")
_CAPABILITIES: Mapping[Capability, Support] = {
    **dict.fromkeys(Capability, FULL),
    Capability.PARTIAL_UPDATE: Support(level=Level.FULL, detail="a quantised module must arrive whole"),
    Capability.STABLE_ADDRESSES: Support(level=Level.FULL, detail="except over sleep and wake"),
    Capability.DRAFT_MODEL: Support(level=Level.FULL, detail="a head in the model's own checkpoint"),
    Capability.LORA: _NO_LORA,
}


@hookimpl
def ckpt_engine_info() -> EngineInfo:
    """Names, versions, capabilities."""
    try:
        own = version("ckpt-core")
    except PackageNotFoundError:
        own = "0"
    return EngineInfo(name=ENGINE, plugin_version=own, engine_version=own, capabilities=_CAPABILITIES)


# -- in each rank process ------------------------------------------------------------
@hookimpl
def ckpt_identify(worker: Worker) -> RankInfo:
    """Who this rank is."""
    return RankInfo(
        instance_id=worker.instance_id,
        device_kind=DeviceKind(worker.device.type),
        device_index=worker.device.index or 0,
        device_uuid=worker.device_uuid,
        rank=worker.rank,
        world_size=worker.tp_size,
        tp_rank=worker.rank,
        tp_size=worker.tp_size,
    )


@hookimpl
def ckpt_supports(worker: Worker) -> None:
    """Every model can be updated; not every state."""
    worker.check_updatable()


@hookimpl
def ckpt_layout(worker: Worker, manifest: Manifest) -> Layout:
    """Whole tensors, in model order, grouped by parent module; names compared with the model's own table."""
    from ckpt_conformance.reference.loadable import describe

    given = {meta.name: meta for meta in manifest.tensors}
    table, ignored = worker.model.table, worker.model.ignored
    mismatched = []
    for name, target in table.items():
        if name in given:
            expected = describe(target.dtype, target.shape)
            got = f"{given[name].dtype.value} {list(given[name].shape)}"
            if got != expected:
                mismatched.append(Mismatch(tensor=name, expected=expected, got=got))
    return Layout(
        entries=tuple(LayoutEntry(tensor=n, group=t.group) for n, t in table.items() if n in given),
        missing=tuple(name for name in table if name not in given),
        unknown=tuple(sorted(given.keys() - table.keys() - ignored)),
        mismatched=tuple(mismatched),
    )


@hookimpl
def ckpt_recording_target(worker: Worker) -> RecordingTarget:
    """A model on the meta device, whose loader is the live one's."""
    return worker.recording_target()


@hookimpl
def ckpt_snapshot(worker: Worker, update: Update) -> Snapshot:
    """Copies of all live tensors."""
    return worker.snapshot()


@hookimpl
def ckpt_begin(worker: Worker, update: Update) -> None:
    """Make parameters loadable."""
    worker.begin_update(update)


@hookimpl
def ckpt_load(worker: Worker, update: Update, bucket: LoadBucket) -> LoadReport:
    """Load the tensors of one bucket; nothing is retained."""
    return worker.load(update, list(bucket.named_tensors()))


@hookimpl
def ckpt_finish(worker: Worker, update: Update) -> None:
    """Quantise, and synchronise the device."""
    worker.finish_update(update)


@hookimpl
def ckpt_abort(worker: Worker, update: Update, cause: str) -> AbortOutcome:
    """UNTOUCHED or RELOADABLE."""
    return worker.abort_update(update, cause)


@hookimpl
def ckpt_restore(worker: Worker, update: Update, snapshot: Snapshot) -> None:
    """Write a snapshot back in place."""
    worker.restore(snapshot)


@hookimpl
def ckpt_poison(worker: Worker, cause: str | None) -> None:
    """The forward pass refuses while armed."""
    worker.set_poison(cause)


@hookimpl
def ckpt_live(worker: Worker) -> Mapping[str, LiveTensor]:
    """Live tensors; position tables are constants of the config and not among them."""
    return worker.live()


# -- on the control side ------------------------------------------------------------
@hookimpl
def ckpt_ready(endpoint: Endpoint) -> EndpointStatus:
    """GET /status, or the status of the worker in this process."""
    if endpoint.handle is not None:
        status: EndpointStatus = endpoint.handle.status()
        return status
    return _status_of(endpoint, endpoint.request("GET", "/status"))


@hookimpl
def ckpt_attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """POST /attach: blocks until every rank is out."""
    if endpoint.handle is not None:
        endpoint.handle.attach(rendezvous)
        return
    body = {"rendezvous": dataclasses.asdict(rendezvous)}
    endpoint.request("POST", "/attach", json=body, timeout_s=rendezvous.lifetime_s)


@hookimpl
def ckpt_wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """POST /wake."""
    if endpoint.handle is not None:
        endpoint.handle.wake(tags)
        return
    endpoint.request("POST", "/wake", params={"tags": ",".join(tags)})


@hookimpl
def ckpt_pause(endpoint: Endpoint, mode: PauseMode) -> int:
    """POST /pause: returns once no step runs."""
    if endpoint.handle is not None:
        return int(endpoint.handle.pause(mode))
    answer = endpoint.request("POST", "/pause", params={"mode": mode.value}, timeout_s=endpoint.options.pause_timeout_s)
    try:
        return int(answer.json()["in_flight"])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(f"{endpoint}: POST /pause answered {answer.text[:200]}; check the address") from error


@hookimpl
def ckpt_flush_cache(endpoint: Endpoint) -> None:
    """POST /flush_cache: refused while a request holds the cache."""
    if endpoint.handle is not None:
        endpoint.handle.flush_cache()
        return
    endpoint.request("POST", "/flush_cache")


@hookimpl
def ckpt_resume(endpoint: Endpoint, version: str | None) -> None:
    """POST /resume."""
    if endpoint.handle is not None:
        endpoint.handle.resume(version)
        return
    endpoint.request("POST", "/resume", json={"version": version})


def _status_of(endpoint: Endpoint, response: httpx.Response) -> EndpointStatus:
    try:
        answer = response.json()
        return EndpointStatus(
            engine=answer["engine"],
            state=EndpointState(answer["state"]),
            world_size=int(answer["world_size"]),
            device_kind=DeviceKind(answer["device_kind"]),
            instance_id=answer["instance_id"],
            version=answer["version"],
            device_uuids=tuple(answer["device_uuids"]),
            detail=answer["detail"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(
            f"{endpoint}: GET /status answered {response.text[:200]}, not a reference engine's; check the address"
        ) from error
