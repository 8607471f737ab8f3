"""The control side: each hook as one or two calls of all ranks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.errors import ConfigError, EngineError, EngineStateError, EngineUnavailable
from ckpt_trtllm.calls import ENGINE, Answer
from ckpt_trtllm.handles import Handle, handle_of

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint

_COMMITTED, _UNTOUCHED = "committed", "untouched"
_PARKS = (PauseMode.WAIT, PauseMode.ABORT)


def ready(endpoint: Endpoint) -> EndpointStatus:
    """See `ckpt_ready`."""
    handle = _handle(endpoint)
    try:
        ranks = _rpc(handle, "ckpt_status", uuid.uuid4().hex, timeout_s=endpoint.options.timeout_s)
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{endpoint}: {error}") from error
    return status_of(ranks)


def attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """See `ckpt_attach`. Where a rank was left mixed, or ranks ended differently, TensorRT-LLM wants all to be told."""
    handle = _handle(endpoint)
    results = _rpc(handle, "ckpt_attach", asdict(rendezvous), timeout_s=rendezvous.lifetime_s)
    outcomes = {str(result.get("outcome", "")) for result in results}
    if outcomes not in ({_COMMITTED}, {_UNTOUCHED}):
        causes = (str(result.get("cause") or result["error"]) for result in results)
        reason = next(filter(None, causes), "another rank failed")
        told = _rpc(handle, "ckpt_abort", reason, timeout_s=endpoint.options.timeout_s)
        _check(endpoint, "abort", told)
    _check(endpoint, "attach", results)


def pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """See `ckpt_pause`.

    Raises:
        EngineStateError: the engine has no such pause; it goes on as before.
    """
    handle, timeout_s = _handle(endpoint), endpoint.options.pause_timeout_s
    if mode not in _PARKS:
        raise EngineStateError(f"{endpoint}: pause mode {mode.value} is not there; use wait or abort")
    # parked already: to ask it for an idle executor would wait for ever
    running = not all(status["held"] for status in _statuses(endpoint, handle))
    if mode is PauseMode.ABORT and running and not handle.abort_requests(timeout_s):
        raise EngineStateError(
            f"{endpoint}: this TensorRT-LLM cannot abort the requests in flight; use pause mode wait"
        )
    parked = _rpc(handle, "ckpt_pause", timeout_s=timeout_s)
    _check(endpoint, "pause", parked)
    met = parked[0]["met"]
    return None if met is None else int(met)


def flush_cache(endpoint: Endpoint) -> None:
    """See `ckpt_flush_cache`."""
    _check(endpoint, "flush", _rpc(_handle(endpoint), "ckpt_flush", timeout_s=endpoint.options.timeout_s))


def resume(endpoint: Endpoint, version: str | None) -> None:
    """See `ckpt_resume`. All ranks go on, or none: one that may not would leave the others waiting for it.

    Raises:
        EngineStateError: a rank may not serve; nothing was changed.
    """
    handle, timeout_s = _handle(endpoint), endpoint.options.timeout_s
    for status in _statuses(endpoint, handle):
        if status["refuses"] or status["updating"]:
            raise EngineStateError(
                f"{endpoint} cannot resume: rank {status['rank']}: {status['refuses'] or 'an update is running'}"
            )
    _check(endpoint, "resume", _rpc(handle, "ckpt_resume", version, timeout_s=timeout_s))
    handle.admit_requests(timeout_s)


def status_of(ranks: Sequence[Mapping[str, Any]]) -> EndpointStatus:
    """What the ranks' answers mean together."""
    if broken := next((rank["error"] for rank in ranks if rank["error"]), ""):
        return EndpointStatus(
            engine=ENGINE, state=EndpointState.DEAD, world_size=len(ranks), device_kind=DeviceKind.CUDA, detail=broken
        )
    first = ranks[0]
    versions = {rank["version"] for rank in ranks}
    on_gpu = first["device_kind"] == DeviceKind.CUDA.value
    state, detail = _state_of(ranks)
    return EndpointStatus(
        engine=ENGINE,
        state=state,
        world_size=int(first["world_size"]),
        device_kind=DeviceKind(first["device_kind"]),
        instance_id=str(first["instance_id"]),
        version=str(versions.pop()) if len(versions) == 1 else "",
        device_uuids=tuple(str(rank["device_uuid"]) for rank in ranks) if on_gpu else (),
        detail=detail,
    )


def _state_of(ranks: Sequence[Mapping[str, Any]]) -> tuple[EndpointState, str]:
    if any(rank["updating"] for rank in ranks):
        return EndpointState.UPDATING, "an update is running"
    for rank in ranks:
        if rank["refuses"]:
            state = EndpointState.WAITING_FOR_WEIGHTS if rank["waiting"] else EndpointState.POISONED
            return state, f"rank {rank['rank']}: {rank['refuses']}"
    if len({rank["instance_id"] for rank in ranks}) > 1:
        return EndpointState.STARTING, "the ranks were told different instances; ask again"
    if any(rank["held"] for rank in ranks):
        return EndpointState.PAUSED, "its executor is parked"
    return EndpointState.SERVING, ""


def _statuses(endpoint: Endpoint, handle: Handle) -> list[Answer]:
    statuses = _rpc(handle, "ckpt_status", uuid.uuid4().hex, timeout_s=endpoint.options.timeout_s)
    _check(endpoint, "status", statuses)
    return statuses


def _handle(endpoint: Endpoint) -> Handle:
    if endpoint.handle is None:
        raise ConfigError(
            f"{endpoint}: TensorRT-LLM has no HTTP route to its workers; update it from the process that holds the LLM: "
            'Target(engine="trtllm", url=..., handle=llm)'
        )
    return handle_of(endpoint.handle)


def _rpc(handle: Handle, method: str, *args: Any, timeout_s: float) -> list[Answer]:
    answers = handle.rpc(method, args, timeout_s)
    if not answers or not all(isinstance(answer, dict) and "error" in answer for answer in answers):
        raise EngineUnavailable(f"{method} answered {str(answers)[:200]}; install the same ckpt-core on both sides")
    return answers


def _check(endpoint: Endpoint, what: str, answers: Sequence[Answer]) -> None:
    for rank, answer in enumerate(answers):
        if answer["error"]:
            raise EngineError(f"{endpoint}: {what} failed on rank {rank}: {answer['error']}")
