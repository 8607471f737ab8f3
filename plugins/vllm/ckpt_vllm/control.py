"""The control side of a vLLM server: which road it offers, and each hook as one or two of its routes.

The routes are there when the server runs with VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.errors import EngineError, EngineUnavailable
from ckpt_vllm import native
from ckpt_vllm.facts import EngineFacts

if TYPE_CHECKING:
    import httpx

    from ckpt_core.endpoint import Endpoint

_log = logging.getLogger(__name__)
ENGINE = "vllm"
_STATUS_TIMEOUT_S = 10.0
_CONFIG, _PAUSING = "vllm server config", "vllm pause that is being answered"
_VERSIONLESS = "vllm has no weight versions"
_EXTENSION = "ckpt_vllm.extension.CkptWorkerExtension"
_HOW_TO_START = (
    'start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and --weight-transfer-config \'{"backend": "ckpt"}\' '
    f"(or --worker-extension-cls {_EXTENSION})"
)


class Road(Enum):
    """How an update enters vLLM."""

    NATIVE = "weight-transfer engine"
    EXTENSION = "worker extension"
    IN_PROCESS = "engine object in this process"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server says of itself.

    Attributes:
        cores: engine cores, one per data parallel rank.
        multimodal: has caches of images and the like; also where it does not tell.
    """

    road: Road
    world_size: int
    cores: int
    device_kind: DeviceKind
    instance_id: str
    multimodal: bool = True


# -- the hooks -----------------------------------------------------------------------------------------------------------
def ready(endpoint: Endpoint) -> EndpointStatus:
    """See `ckpt_ready`."""
    if not _alive(endpoint):
        return EndpointStatus(
            engine=ENGINE,
            state=EndpointState.DEAD,
            world_size=0,
            device_kind=DeviceKind.CPU,
            detail="GET /health says that the engine behind the server is dead",
        )
    config = _config(endpoint)
    try:
        ranks = _rpc(endpoint, "ckpt_status", timeout_s=_STATUS_TIMEOUT_S)
    except EngineUnavailable as error:
        return _status(
            config, EndpointState.UPDATING, detail=f"it does not answer now; an update may be running ({error})"
        )
    return status_of(config, ranks)


def attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """See `ckpt_attach`: by the road that the server offers."""
    if _known_config(endpoint).road is Road.EXTENSION:
        given = {"rendezvous": asdict(rendezvous)}
        _rpc(endpoint, "ckpt_attach", kwargs=given, timeout_s=rendezvous.lifetime_s)
    else:
        native.transfer(endpoint, rendezvous)


def wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """See `ckpt_wake`."""
    query = "&".join(f"tags={tag}" for tag in tags)
    endpoint.request("POST", f"/wake_up?{query}" if query else "/wake_up", timeout_s=endpoint.options.pause_timeout_s)


def pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """See `ckpt_pause`. vLLM sleeps for 20 ms before it answers: what else is to be done goes into that time, and an engine
    that was idle is not waited for."""
    engine_mode, clear_cache = PAUSE[mode]
    params = {"mode": engine_mode, "clear_cache": str(clear_cache).lower()}
    timeout_s, config = endpoint.options.pause_timeout_s, _known_config(endpoint)
    threads = ThreadPoolExecutor(2, thread_name_prefix="ckpt-vllm-pause")
    try:
        pausing = threads.submit(endpoint.request, "POST", "/pause", params=params, timeout_s=timeout_s)
        opening = threads.submit(native.open_session, endpoint) if config.road is Road.NATIVE else None
        facts = _facts(endpoint)
        if opening is not None:
            opening.result()
    except BaseException:
        threads.shutdown()  # whoever resumes comes after the pause
        raise
    threads.shutdown(wait=False)
    if config.cores == 1 and facts.is_idle:
        endpoint.notes[_PAUSING] = pausing
        return facts.met
    pausing.result()
    return _facts(endpoint).met


def flush_cache(endpoint: Endpoint) -> None:
    """See `ckpt_flush_cache`: the prefix cache, and where the model has them the multimodal and encoder caches."""
    routes = ["/reset_prefix_cache"]
    if _known_config(endpoint).multimodal:
        routes += ["/reset_mm_cache", "/reset_encoder_cache"]
    with ThreadPoolExecutor(len(routes), thread_name_prefix="ckpt-vllm-flush") as threads:
        prefix, *_ = threads.map(partial(endpoint.request, "POST"), routes)
    if _json(prefix).get("success") is False:
        raise EngineError(f"{endpoint} kept its prefix cache: requests still hold blocks of it; abort them or wait")


def resume(endpoint: Endpoint, version: str | None) -> None:
    """See `ckpt_resume`. The version goes first, so that no token carries the old one."""
    pausing = endpoint.notes.pop(_PAUSING, None)
    if isinstance(pausing, Future) and (error := pausing.exception()) is not None:
        _log.warning("%s was seen paused, but never said so: %s", endpoint, error)
    try:
        if version is not None and endpoint.notes.get(_VERSIONLESS) is None:
            _tell_version(endpoint, version)
        endpoint.request("POST", "/resume")
    finally:
        native.settle(endpoint)


def _tell_version(endpoint: Endpoint, version: str) -> None:
    try:
        endpoint.request("POST", "/update_weight_version", json={"new_version": version})
    except EngineUnavailable:
        if not _alive(endpoint):
            raise
        endpoint.notes[_VERSIONLESS] = True  # a vLLM before 0.32


PAUSE: Mapping[PauseMode, tuple[str, bool]] = {
    PauseMode.ABORT: ("abort", False),
    PauseMode.WAIT: ("wait", False),
    PauseMode.KEEP: ("keep", False),
    PauseMode.IN_PLACE: ("keep", False),
    PauseMode.RETRACT: ("keep", True),  # vLLM preempts what runs to clear the cache; it is computed again later
}


def _facts(endpoint: Endpoint) -> EngineFacts:
    return facts_in(_rpc(endpoint, "ckpt_status", timeout_s=_STATUS_TIMEOUT_S))


def facts_in(ranks: Sequence[Mapping[str, Any]]) -> EngineFacts:
    """What the engine core told with the answers of its ranks."""
    found = ranks[0].get("engine") if ranks else None
    return EngineFacts.from_json(found) if found else EngineFacts()


def status_of(config: ServerConfig, ranks: Sequence[Mapping[str, Any]]) -> EndpointStatus:
    """What the ranks' answers mean together."""
    broken = next((rank["error"] for rank in ranks if rank.get("error")), "")
    if broken:
        return _status(config, EndpointState.DEAD, detail=broken)
    facts = ranks[0].get("engine") or {}
    poison = next((rank["poison"] for rank in ranks if rank.get("poison")), "")
    versions = {rank.get("version", "") for rank in ranks}
    version = versions.pop() if len(versions) == 1 else ""
    state = EndpointState.SERVING
    if any(rank.get("updating") for rank in ranks):
        state = EndpointState.UPDATING
    elif facts.get("weights_asleep"):
        state = EndpointState.ASLEEP
    elif poison:
        state = EndpointState.WAITING_FOR_WEIGHTS if "wait for its first weights" in poison else EndpointState.POISONED
    elif facts.get("paused"):
        state = EndpointState.PAUSED
    gpus = tuple(rank["gpu"] for rank in ranks if rank.get("gpu"))
    known = str(facts.get("version", ""))
    return _status(config, state, version=version or known, detail=poison, gpus=gpus)


def _status(
    config: ServerConfig,
    state: EndpointState,
    *,
    version: str = "",
    detail: str = "",
    gpus: tuple[str, ...] = (),
) -> EndpointStatus:
    return EndpointStatus(
        engine=ENGINE,
        state=state,
        world_size=config.world_size,
        device_kind=config.device_kind,
        instance_id=config.instance_id,
        version=version,
        device_uuids=gpus,
        detail=f"by {config.road.value}" + (f"; {detail}" if detail else ""),
    )


# -- the routes ----------------------------------------------------------------------------------------------------------
def _alive(endpoint: Endpoint) -> bool:
    """False where a server answers for an engine that is dead.

    Raises:
        EngineUnavailable: nothing answers.
    """
    try:
        endpoint.request("GET", "/health")
    except EngineUnavailable as error:
        if error.__cause__ is not None:
            raise
        return False
    return True


def _config(endpoint: Endpoint) -> ServerConfig:
    try:
        answer = endpoint.request("GET", "/server_info", params={"config_format": "json"})
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{endpoint} has no control routes; {_HOW_TO_START} ({error})") from error
    found = config_of(_json(answer).get("vllm_config"), where=str(endpoint))
    endpoint.notes[_CONFIG] = found
    return found


def _known_config(endpoint: Endpoint) -> ServerConfig:
    """As of the last check."""
    known = endpoint.notes.get(_CONFIG)
    return known if isinstance(known, ServerConfig) else _config(endpoint)


def config_of(found: Any, *, where: str) -> ServerConfig:
    """Read vLLM's configuration as GET /server_info gives it.

    Raises:
        EngineUnavailable: it is no vLLM's, or offers no road.
    """
    try:
        parallel, device = found["parallel_config"], found["device_config"]["device"]
        transfer, extension = found.get("weight_transfer_config") or {}, parallel["worker_extension_cls"] or ""
        cores = int(parallel["data_parallel_size"])
        world_size = int(parallel["world_size"]) * cores
        instance_id = str(found["instance_id"])
        multimodal = (found.get("model_config") or {}).get("multimodal_config", True) is not None
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(
            f"{where} answered, but not as a vLLM server does ({error!r}); check the address"
        ) from error
    if transfer.get("backend") == "ckpt":
        road = Road.NATIVE
    elif extension.startswith("ckpt_vllm."):
        road = Road.EXTENSION
    else:
        raise EngineUnavailable(f"{where} offers no way in for weights; {_HOW_TO_START}")
    kind = DeviceKind.CPU if str(device).startswith("cpu") else DeviceKind.CUDA
    return ServerConfig(
        road=road,
        world_size=world_size,
        cores=cores,
        device_kind=kind,
        instance_id=instance_id,
        multimodal=multimodal,
    )


def _rpc(endpoint: Endpoint, method: str, *, timeout_s: float, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
    body = {"method": method, "kwargs": dict(kwargs or {})}
    answer = _json(endpoint.request("POST", "/collective_rpc", json=body, timeout_s=timeout_s))
    results = answer.get("results")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise EngineUnavailable(
            f"{endpoint}: {method} answered {str(answer)[:200]}; install the same ckpt-core on both sides"
        )
    return results


def _json(response: httpx.Response) -> dict[str, Any]:
    """Body as an object; an empty one where it has none."""
    if not response.content:
        return {}
    try:
        found = response.json()
    except ValueError as error:
        raise EngineUnavailable(f"{response.url} answered {response.text[:200]}, which is no JSON") from error
    return found if isinstance(found, dict) else {}
