"""SGLang's hooks in the process that takes requests: routes, refusals, and a wait for weights that fails closed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ckpt_core.contract import PauseMode
from ckpt_core.errors import CkptError, ConfigError, EngineStateError
from ckpt_sglang import compat, compat_front
from ckpt_sglang.control import KEY, control_of

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_HEALTH_PATHS = ("/health", "/health_generate", "/ready")
HTTP_UNAVAILABLE, HTTP_ERROR = 503, 500
_STATUS: dict[type[CkptError], int] = {EngineStateError: 409, ConfigError: 400}


def after_tokenizer_init(_result: None, manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """A tokenizer manager is made: in a server's process, the server gets our routes."""
    control_of(manager)
    http = compat_front.http_module()
    if http is not None:
        setattr(http, compat.WAIT_FUNCTION, partial(wait_for_weights, manager, http))
        add_routes(http.app, manager)


async def around_update(original: Callable[..., Awaitable[Any]], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """The first of `args` is the request. While an update is attached the scheduler answers nothing: remember that it is."""
    control = control_of(manager)
    if KEY in args[0].zmq_handles:
        await control.pause_scheduler()
    control.updating = True
    try:
        answer = await original(manager, *args, **kwargs)
    finally:
        control.updating = False
    with contextlib.suppress(CkptError):  # told to whoever asks for the status
        facts = await control.facts()
        if KEY in args[0].zmq_handles and answer[0]:  # SGLang notes those of its own updates
            compat_front.note_version(manager, facts["version"])
    return answer


async def around_continue(original: Callable[..., Awaitable[Any]], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """A resume of poisoned weights is refused before anything is told that it may go on."""
    try:
        await control_of(manager).check_may_serve()
    except EngineStateError as error:
        raise compat_front.conflict(str(error)) from error
    return await original(manager, *args, **kwargs)


def wait_for_weights(manager: Any, http: Any) -> None:
    """Instead of SGLang's own wait, which gives up after its timeout and serves dummy weights: this one never does.

    Until the weights are committed and somebody resumed, since the warm-up that follows would otherwise wait in the pause.
    """
    timeout_s, start, told = float(http.WAIT_WEIGHTS_READY_TIMEOUT), time.monotonic(), False
    while not manager.initial_weights_loaded or manager.is_pause:
        if manager.gracefully_exit or not threading.main_thread().is_alive():
            raise SystemExit  # ends this thread
        if not told and time.monotonic() - start > timeout_s:
            told = True
            _log.error("ckpt: no weights after %g s; the server stays unhealthy until an update commits", timeout_s)
        time.sleep(_POLL_S)
    _log.info("ckpt: weights are ready after %.2f s", time.monotonic() - start)


def add_routes(app: Any, manager: Any) -> None:
    """/ckpt/status, /ckpt/pause and /ckpt/resume; health of a poisoned server is 503."""
    from fastapi.responses import JSONResponse

    async def answer(work: Awaitable[Any]) -> Any:
        try:
            return JSONResponse(await work)
        except CkptError as error:
            status = _STATUS.get(type(error), HTTP_ERROR)
            return JSONResponse({"error": type(error).__name__, "message": str(error)}, status_code=status)

    async def status() -> Any:
        return await answer(_status(manager))

    async def pause(mode: str, timeout_s: float) -> Any:
        return await answer(_pause(manager, mode, timeout_s))

    async def resume(version: str | None = None) -> Any:
        return await answer(_resume(manager, version))

    for path, method, function in (
        ("/ckpt/status", "GET", status),
        ("/ckpt/pause", "POST", pause),
        ("/ckpt/resume", "POST", resume),
    ):
        # the annotations above are text, which FastAPI reads in this module
        app.add_api_route(path, compat_front.admin_route(function), methods=[method])
    app.add_middleware(PoisonedHealth, manager=manager)


class PoisonedHealth:
    """ASGI middleware: a server with poisoned weights is not healthy, and routers must know."""

    def __init__(self, app: Any, manager: Any) -> None:
        self._app = app
        self._control = control_of(manager)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer health checks while poisoned; hand on everything else."""
        if scope["type"] == "http" and scope["path"] in _HEALTH_PATHS and self._control.refuses:
            from fastapi.responses import JSONResponse

            body = {"error": "poisoned", "message": self._control.refuses}
            await JSONResponse(body, status_code=HTTP_UNAVAILABLE)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _status(manager: Any) -> dict[str, Any]:
    found = await control_of(manager).status()
    return {
        "engine": found.engine,
        "state": found.state.value,
        "world_size": found.world_size,
        "device_kind": found.device_kind.value,
        "instance_id": found.instance_id,
        "version": found.version,
        "detail": found.detail,
    }


async def _pause(manager: Any, mode: str, timeout_s: float) -> dict[str, Any]:
    if mode not in {known.value for known in PauseMode}:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(known.value for known in PauseMode)}")
    return {"in_flight": await control_of(manager).pause(PauseMode(mode), timeout_s)}


async def _resume(manager: Any, version: str | None) -> dict[str, Any]:
    await control_of(manager).resume(version)
    return {"resumed": True}
