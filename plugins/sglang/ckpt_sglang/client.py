"""The control side's calls: over HTTP to a server, or to an engine object in this process."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, Protocol

import httpx

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError, EngineUnavailable
from ckpt_sglang.control import KEY, EngineControl, control_of, encode

_MARGIN_S = 10.0  # an HTTP call may take this much longer than what it asks for


class Client(Protocol):
    """One SGLang engine, as the hooks of the control side need it."""

    def status(self) -> EndpointStatus: ...
    def pause(self, mode: PauseMode) -> int: ...
    def attach(self, rendezvous: Rendezvous) -> None: ...
    def flush(self) -> None: ...
    def resume(self, version: str | None) -> None: ...
    def wake(self, tags: tuple[str, ...]) -> None: ...


def client_of(endpoint: Endpoint) -> Client:
    """The way to an endpoint: its handle where it has one, else HTTP."""
    handle = endpoint.handle
    if handle is None:
        return HttpClient(endpoint)
    return handle if isinstance(handle, ClientHandle) else HandleClient(handle, endpoint)


class ClientHandle(ABC):
    """Base of handles that are clients themselves."""

    @abstractmethod
    def status(self) -> EndpointStatus: ...
    @abstractmethod
    def pause(self, mode: PauseMode) -> int: ...
    @abstractmethod
    def attach(self, rendezvous: Rendezvous) -> None: ...
    @abstractmethod
    def flush(self) -> None: ...
    @abstractmethod
    def resume(self, version: str | None) -> None: ...
    @abstractmethod
    def wake(self, tags: tuple[str, ...]) -> None: ...


class HttpClient:
    """A server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def status(self) -> EndpointStatus:
        """GET /ckpt/status."""
        try:
            response = self._endpoint.request("GET", "/ckpt/status")
        except EngineUnavailable as error:
            raise self._explained(error) from error
        return status_of(self._endpoint, response)

    def pause(self, mode: PauseMode) -> int:
        """POST /ckpt/pause."""
        timeout_s = self._endpoint.options.pause_timeout_s
        params = {"mode": mode.value, "timeout_s": str(timeout_s)}
        answer = self._endpoint.request("POST", "/ckpt/pause", params=params, timeout_s=timeout_s + _MARGIN_S)
        return int(answer.json()["in_flight"])

    def attach(self, rendezvous: Rendezvous) -> None:
        """POST /update_weights_from_ipc, without its own flush and version: both come after the commit."""
        body = {"zmq_handles": {KEY: encode(rendezvous)}, "flush_cache": False, "weight_version": None}
        self._endpoint.request("POST", "/update_weights_from_ipc", json=body, timeout_s=rendezvous.lifetime_s)

    def flush(self) -> None:
        """POST /flush_cache: 400 while requests hold it."""
        self._endpoint.request("POST", "/flush_cache")

    def resume(self, version: str | None) -> None:
        """POST /ckpt/resume."""
        self._endpoint.request("POST", "/ckpt/resume", params={} if version is None else {"version": version})

    def wake(self, tags: tuple[str, ...]) -> None:
        """POST /resume_memory_occupation."""
        self._endpoint.request("POST", "/resume_memory_occupation", json={"tags": list(tags) or None})

    def _explained(self, error: EngineUnavailable) -> EngineUnavailable:
        """Why there is no /ckpt/status: no server, another one, or SGLang without the plugin."""
        if "answered 404" not in str(error):
            return error
        try:
            self._endpoint.request("GET", "/model_info")
        except EngineError:
            return EngineUnavailable(f"{self._endpoint} is no SGLang server; name the right engine ({error})")
        return EngineUnavailable(
            f"{self._endpoint} is an SGLang server without the ckpt plugin; install ckpt-core where it runs and start it again "
            '(and name "ckpt" in SGLANG_PLUGINS if that is set)'
        )


class HandleClient:
    """An `sglang.Engine` in this process."""

    def __init__(self, engine: Any, endpoint: Endpoint) -> None:
        self._engine = engine
        self._options = endpoint.options
        try:
            self._control: EngineControl = control_of(engine.tokenizer_manager)
        except AttributeError as error:
            raise EngineError(f"{endpoint}: expected an sglang.Engine as handle, got {engine!r}") from error

    def status(self) -> EndpointStatus:
        """Of the engine."""
        return self._run(self._control.status(), self._options.timeout_s)  # type: ignore[no-any-return]

    def pause(self, mode: PauseMode) -> int:
        """No new request gets in."""
        timeout_s = self._options.pause_timeout_s
        return int(self._run(self._control.pause(mode, timeout_s), timeout_s + _MARGIN_S))

    def attach(self, rendezvous: Rendezvous) -> None:
        """Blocks until every rank is out."""
        self._run(self._control.attach(rendezvous), rendezvous.lifetime_s)

    def flush(self) -> None:
        """Drop the caches."""
        self._run(self._control.flush(), self._options.timeout_s)

    def resume(self, version: str | None) -> None:
        """Serve again."""
        self._run(self._control.resume(version), self._options.timeout_s)

    def wake(self, tags: tuple[str, ...]) -> None:
        """Take released memory back."""
        self._run(self._control.wake(tags), self._options.timeout_s)

    def _run(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """In the engine's event loop: handed over where it runs in another thread, else run here."""
        loop = self._engine.tokenizer_manager.event_loop or self._engine.loop
        if loop.is_running():
            return asyncio.run_coroutine_threadsafe(work, loop).result(timeout_s)
        with _loop_lock(loop):
            return loop.run_until_complete(asyncio.wait_for(work, timeout_s))


_locks: dict[int, threading.Lock] = {}


def _loop_lock(loop: asyncio.AbstractEventLoop) -> threading.Lock:
    """Two threads must not run one loop."""
    return _locks.setdefault(id(loop), threading.Lock())


def status_of(endpoint: Endpoint, response: httpx.Response) -> EndpointStatus:
    """The answer of /ckpt/status.

    Raises:
        EngineUnavailable: it is something else.
    """
    try:
        answer = response.json()
        return EndpointStatus(
            engine=answer["engine"],
            state=EndpointState(answer["state"]),
            world_size=int(answer["world_size"]),
            device_kind=DeviceKind(answer["device_kind"]),
            instance_id=answer["instance_id"],
            version=answer["version"],
            detail=answer["detail"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineUnavailable(
            f"{endpoint}: GET /ckpt/status answered {response.text[:200]}, not an SGLang server's; check the address"
        ) from error
