"""The control side of a vLLM in this process: `LLM`, or `AsyncLLM` with the loop that runs it.

    Target(engine="vllm", url="any label", handle=llm)
    Target(engine="vllm", url="any label", handle=AsyncHandle(async_llm, loop))

The semantics are those of a server, and no flag is needed: the plugin is loaded by vLLM itself. The update must be called from
another thread than the one that runs the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from ckpt_core.contract import DeviceKind, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.errors import ConfigError, EngineError, EngineStateError, EngineUnavailable
from ckpt_vllm import compat, control
from ckpt_vllm.control import PAUSE, Road, ServerConfig, facts_in
from ckpt_vllm.guard import ATTACH, STATUS

if TYPE_CHECKING:
    from ckpt_core.endpoint import Endpoint


class Handle(Protocol):
    """What the hooks need of an engine object. Every call has a deadline where the object allows one."""

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""

    def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Answers of all ranks."""

    def pause(self, mode: str, clear_cache: bool, timeout_s: float) -> None:
        """Returns once no step runs."""

    def resume(self, timeout_s: float) -> None:
        """Raises while the guard is armed."""

    def set_version(self, version: str, timeout_s: float) -> None:
        """Label of the responses from now on."""

    def flush(self, timeout_s: float) -> bool:
        """Whether the prefix cache was dropped."""

    def wake(self, tags: list[str], timeout_s: float) -> None:
        """Bring memory back."""


class SyncHandle:
    """An `LLM`. Its calls are vLLM's own, which have no deadlines."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._engine = llm.llm_engine

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""
        return self._engine.vllm_config

    def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Answers of all ranks."""
        return list(self._engine.collective_rpc(method, None, (), kwargs))

    def pause(self, mode: str, clear_cache: bool, timeout_s: float) -> None:
        """In this process nobody but the caller steps the engine: requests in flight cannot be waited for."""
        if mode == "wait" and compat.is_in_process(self._engine):
            if self._engine.has_unfinished_requests():
                raise EngineStateError(
                    "pause mode wait: nobody steps this LLM; finish its requests, or use abort or keep"
                )
            mode = "abort"
        compat.core_call(self._engine, "pause_scheduler", mode, clear_cache)

    def resume(self, timeout_s: float) -> None:
        """Raises while the guard is armed."""
        compat.core_call(self._engine, "resume_scheduler")

    def set_version(self, version: str, timeout_s: float) -> None:
        """Label of the responses from now on."""
        compat.core_call(self._engine, "set_weight_version", version)

    def flush(self, timeout_s: float) -> bool:
        """Whether the prefix cache was dropped."""
        dropped = self._llm.reset_prefix_cache()
        self._engine.reset_mm_cache()
        compat.core_call(self._engine, "reset_encoder_cache")
        return dropped is not False

    def wake(self, tags: list[str], timeout_s: float) -> None:
        """Bring memory back."""
        self._llm.wake_up(tags or None)


class AsyncHandle:
    """An `AsyncLLM`, and the loop that runs it (in another thread than the update's)."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""
        return self._engine.vllm_config

    def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Answers of all ranks. The deadline is on this side only: vLLM's own would leave a late answer in its queue."""
        return list(self._run(self._engine.collective_rpc(method, None, (), kwargs), method, timeout_s))

    def pause(self, mode: str, clear_cache: bool, timeout_s: float) -> None:
        """Returns once no step runs."""
        self._run(self._engine.pause_generation(mode=mode, clear_cache=clear_cache), "pause", timeout_s)

    def resume(self, timeout_s: float) -> None:
        """Raises while the guard is armed."""
        self._run(self._engine.resume_generation(), "resume", timeout_s)

    def set_version(self, version: str, timeout_s: float) -> None:
        """Label of the responses from now on (since vLLM 0.32.0)."""
        if hasattr(self._engine, "update_weight_version"):
            self._run(self._engine.update_weight_version(version), "update_weight_version", timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Whether the prefix cache was dropped."""
        dropped = self._run(self._engine.reset_prefix_cache(), "reset_prefix_cache", timeout_s)
        self._run(self._engine.reset_mm_cache(), "reset_mm_cache", timeout_s)
        self._run(self._engine.reset_encoder_cache(), "reset_encoder_cache", timeout_s)
        return dropped is not False

    def wake(self, tags: list[str], timeout_s: float) -> None:
        """Bring memory back."""
        self._run(self._engine.wake_up(tags or None), "wake_up", timeout_s)

    def _run(self, call: Coroutine[Any, Any, Any], what: str, timeout_s: float) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result(timeout_s)
        except FutureTimeout:
            raise EngineUnavailable(f"{what}: vLLM did not answer within {timeout_s:g} s; does its loop run?") from None


def handle_of(given: Any) -> Handle:
    """The handle for what a user gave as one.

    Raises:
        ConfigError: it is neither a handle nor an `LLM`.
    """
    if isinstance(given, SyncHandle | AsyncHandle):
        return given
    if hasattr(given, "llm_engine"):
        return SyncHandle(given)
    raise ConfigError(
        f"expected a vllm.LLM or ckpt_vllm.in_process.AsyncHandle(engine, loop), got {type(given).__name__}"
    )


# -- the hooks -----------------------------------------------------------------------------------------------------------
def ready(endpoint: Endpoint) -> EndpointStatus:
    """See `ckpt_ready`."""
    handle = handle_of(endpoint.handle)
    ranks = handle.rpc(STATUS, {}, endpoint.options.timeout_s)
    return control.status_of(_config(handle.vllm_config), ranks)


def attach(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """See `ckpt_attach`."""
    handle_of(endpoint.handle).rpc(ATTACH, {"rendezvous": asdict(rendezvous)}, rendezvous.lifetime_s)


def wake(endpoint: Endpoint, tags: tuple[str, ...]) -> None:
    """See `ckpt_wake`."""
    handle_of(endpoint.handle).wake(list(tags), endpoint.options.pause_timeout_s)


def pause(endpoint: Endpoint, mode: PauseMode) -> int | None:
    """See `ckpt_pause`."""
    handle = handle_of(endpoint.handle)
    engine_mode, clear_cache = PAUSE[mode]
    handle.pause(engine_mode, clear_cache, endpoint.options.pause_timeout_s)
    return facts_in(handle.rpc(STATUS, {}, endpoint.options.timeout_s)).met


def flush_cache(endpoint: Endpoint) -> None:
    """See `ckpt_flush_cache`."""
    if not handle_of(endpoint.handle).flush(endpoint.options.timeout_s):
        raise EngineError(f"{endpoint} kept its prefix cache: requests still hold blocks of it; abort them or wait")


def resume(endpoint: Endpoint, version: str | None) -> None:
    """See `ckpt_resume`."""
    handle = handle_of(endpoint.handle)
    if version is not None:
        handle.set_version(version, endpoint.options.timeout_s)
    handle.resume(endpoint.options.timeout_s)


def _config(config: Any) -> ServerConfig:
    parallel = config.parallel_config
    device = str(config.device_config.device)
    return ServerConfig(
        road=Road.IN_PROCESS,
        world_size=int(parallel.world_size) * int(parallel.data_parallel_size),
        cores=int(parallel.data_parallel_size),
        device_kind=DeviceKind.CPU if device.startswith("cpu") else DeviceKind.CUDA,
        instance_id=str(config.instance_id),
    )
