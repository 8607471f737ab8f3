"""The HTTP face of the engine: generate, health, and the control calls that an update needs."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import asdict
from enum import Enum
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from ckpt_conformance.reference.engine import Engine
from ckpt_conformance.reference.options import TAGS
from ckpt_conformance.reference.requests import Event, FinishReason, Request, version_spans
from ckpt_conformance.reference.scheduler import PAUSE_MODES
from ckpt_conformance.reference.text import TextCodec
from ckpt_core.bearer_guard import BearerGuard
from ckpt_core.contract import EndpointState, PauseMode, Rendezvous
from ckpt_core.errors import CkptError, ConfigError, EngineStateError, EngineUnavailable

T = TypeVar("T")
PAUSE_TIMEOUT_S = 600.0
CONTROL_TIMEOUT_S = 120.0
_HEALTHY = (EndpointState.SERVING, EndpointState.PAUSED)


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /generate; exactly one of the prompts."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    stream: bool = False


class AttachBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /attach."""

    rendezvous: Rendezvous


class VersionBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /resume (optional) and POST /version."""

    version: str | None = None


class Server:
    """Handlers over an engine. Errors become 400 (the request), 409 (the state), 429 (queue full), 503 (not there)."""

    def __init__(self, engine: Engine, codec: TextCodec) -> None:
        self._engine, self._codec = engine, codec
        self._ids = itertools.count(1)

    def app(self, bearer_token: str = "") -> ASGIApp:
        """The ASGI application."""
        post = {
            "/generate": self.generate,
            "/pause": self.pause,
            "/resume": self.resume,
            "/flush_cache": self.flush_cache,
            "/sleep": self.sleep,
            "/wake": self.wake,
            "/version": self.set_version,
            "/attach": self.attach,
        }
        get = {
            "/health": self.health,
            "/status": self.status,
            "/version": self.version,
            "/live_digests": self.live_digests,
        }
        routes = [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
        routes += [Route(path, handler, methods=["GET"]) for path, handler in get.items()]
        app = Starlette(routes=routes, exception_handlers={CkptError: _refuse, msgspec.MsgspecError: _refuse})
        return BearerGuard(app, bearer_token) if bearer_token else app

    async def generate(self, http: HttpRequest) -> Response:
        """Greedy continuation; Server-Sent Events with `stream`."""
        body = msgspec.json.decode(await http.body(), type=GenerateBody)
        events: asyncio.Queue[Event] = asyncio.Queue()
        request = self._codec.request(
            next(self._ids),
            prompt=body.prompt,
            prompt_token_ids=body.prompt_token_ids,
            max_tokens=body.max_tokens,
            ignore_eos=body.ignore_eos,
            emit=_emitter(events),
        )
        try:
            self._engine.submit(request)
        except EngineStateError as error:
            return JSONResponse({"error": str(error)}, status_code=429)
        if body.stream:
            return StreamingResponse(self._stream(request, events), media_type="text/event-stream")
        async for event in self._events(request, events):
            if event.finish is FinishReason.ERROR:
                return JSONResponse({"error": event.error}, status_code=503)
        return JSONResponse(self._answer(request))

    async def health(self, http: HttpRequest) -> Response:
        """200 only where requests are served, or would be after a resume."""
        status = self._engine.status()
        healthy = status.state in _HEALTHY
        body = {"state": status.state.value, "detail": status.detail}
        return JSONResponse(body, status_code=200 if healthy else 503)

    async def status(self, http: HttpRequest) -> Response:
        """EndpointStatus, and the load."""
        return JSONResponse(_plain(asdict(self._engine.status())) | self._engine.load())

    async def pause(self, http: HttpRequest) -> Response:
        """Stop producing tokens; answers once no step runs."""
        name = http.query_params.get("mode", PauseMode.ABORT.value)
        if name not in {mode.value for mode in PAUSE_MODES}:
            raise ConfigError(f"pause mode {name!r}: expected one of {[mode.value for mode in PAUSE_MODES]}")
        in_flight = await _result(self._engine.pause(PauseMode(name)), PAUSE_TIMEOUT_S)
        return JSONResponse({"in_flight": in_flight})

    async def resume(self, http: HttpRequest) -> Response:
        """Serve again."""
        data = await http.body()
        body = msgspec.json.decode(data, type=VersionBody) if data else VersionBody()
        await _result(self._engine.resume(body.version or http.query_params.get("version")))
        return await self.version(http)

    async def flush_cache(self, http: HttpRequest) -> Response:
        """Drop the prefix cache."""
        await _result(self._engine.flush_cache())
        return JSONResponse({})

    async def sleep(self, http: HttpRequest) -> Response:
        """Drop the weights."""
        if http.query_params.get("level", "1") != "1":
            raise ConfigError(f"sleep level {http.query_params['level']!r}: expected 1 (weights and caches dropped)")
        await _result(self._engine.sleep())
        return JSONResponse({})

    async def wake(self, http: HttpRequest) -> Response:
        """Allocate memory again."""
        tags = [tag for tag in http.query_params.get("tags", ",".join(TAGS)).split(",") if tag]
        if unknown := set(tags) - set(TAGS):
            raise ConfigError(f"wake tags {sorted(unknown)}: expected some of {', '.join(TAGS)}")
        await _result(self._engine.wake(tags))
        return JSONResponse({})

    async def version(self, http: HttpRequest) -> Response:
        """Version that produces tokens."""
        return JSONResponse({"version": self._engine.version})

    async def set_version(self, http: HttpRequest) -> Response:
        """Rename what is there."""
        body = msgspec.json.decode(await http.body(), type=VersionBody)
        self._engine.version = body.version or ""
        return await self.version(http)

    async def live_digests(self, http: HttpRequest) -> Response:
        """Digest of every live tensor, by rank."""
        return JSONResponse({"ranks": await _result(self._engine.digests())})

    async def attach(self, http: HttpRequest) -> Response:
        """Take part in an update; answers when every rank is out. Its outcome travels on the update's socket."""
        body = msgspec.json.decode(await http.body(), type=AttachBody)
        results = await _result(self._engine.attach(body.rendezvous), None)
        return JSONResponse({"ranks": [asdict(result) for result in results]})

    async def _events(self, request: Request, events: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        # no deadline: the engine ends every request, also when it dies
        try:
            while True:
                event = await events.get()
                yield event
                if event.finish is not None:
                    return
        finally:
            self._engine.cancel(request.request_id)

    async def _stream(self, request: Request, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
        sent, token_ids = "", list[int]()
        async for event in self._events(request, events):
            if event.token_id is not None:
                token_ids.append(event.token_id)
                text = self._codec.decode(token_ids)
                new = "" if text.endswith("\ufffd") else text[len(sent) :]
                sent += new
                yield _sse({"token_id": event.token_id, "text": new, "version": event.version})
            elif event.finish is FinishReason.ERROR:
                yield _sse({"error": event.error, "finish_reason": event.finish.value})
            else:
                yield _sse(self._answer(request))

    def _answer(self, request: Request) -> dict[str, Any]:
        assert request.reason is not None
        return {
            "text": self._codec.decode(request.token_ids),
            "token_ids": request.token_ids,
            "finish_reason": request.reason.value,
            "version": request.versions[-1] if request.versions else self._engine.version,
            "weight_versions": [asdict(span) for span in version_spans(request.versions)],
        }


async def _result(future: Future[T], timeout_s: float | None = CONTROL_TIMEOUT_S) -> T:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError as error:
        raise EngineUnavailable(f"the engine did not answer within {timeout_s} s") from error


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    codes = ((EngineStateError, 409), (EngineUnavailable, 503), (ConfigError, 400), (msgspec.MsgspecError, 400))
    code = next((code for kind, code in codes if isinstance(error, kind)), 500)
    return JSONResponse({"error": str(error)}, status_code=code)


def _emitter(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    loop = asyncio.get_running_loop()

    def emit(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    return emit


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in fields.items()}
