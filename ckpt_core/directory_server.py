"""`ckpt serve`: the directory over HTTP, with a bearer token, JSON only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ckpt_core.bearer_guard import BearerGuard
from ckpt_core.directory import Directory
from ckpt_core.errors import CkptError, ConfigError, EngineStateError
from ckpt_core.membership import OwnerEntry
from ckpt_core.p2p.offers import MAX_OFFER_BYTES
from ckpt_core.store_records import EngineRecord

_MAX_SMALL_BYTES = 1 << 20
Handler = Callable[[Request], Awaitable[Response]]


class DirectoryServer:
    """Handlers over a directory. Errors become 400 (the request), 404 (nobody offers it), 409 (a later life), 413 (too large)."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def app(self, token: str) -> ASGIApp:
        """The ASGI application; without a token everybody may call."""
        one, offer = "/owners/{instance}", "/owners/{instance}/offers/{digest}"
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/fleet", self.fleet, methods=["GET"]),
            Route("/engines", self.joined, methods=["PUT"]),
            Route("/owners", self.owners, methods=["GET"]),
            Route(one, self.register, methods=["PUT"]),
            Route(one, self.leave, methods=["DELETE"]),
            Route(offer, self.offer, methods=["PUT"]),
            Route(offer, self.withdraw, methods=["DELETE"]),
            Route(offer, self.offered, methods=["GET"]),
            Route("/offering", self.offering, methods=["GET"]),
        ]
        app = Starlette(routes=routes, exception_handlers={CkptError: _refuse, msgspec.MsgspecError: _refuse})
        return BearerGuard(app, token, hint="set CKPT_DIRECTORY_TOKEN") if token else app

    async def health(self, _http: Request) -> Response:
        """Alive."""
        return Response()

    async def fleet(self, _http: Request) -> Response:
        """See Directory.fleet."""
        return _json(await run_in_threadpool(self._directory.fleet))

    async def joined(self, http: Request) -> Response:
        """See Directory.joined."""
        records = msgspec.json.decode(await _body(http, _MAX_SMALL_BYTES), type=list[EngineRecord])
        await run_in_threadpool(self._directory.joined, records)
        return Response(status_code=204)

    async def owners(self, _http: Request) -> Response:
        """See Directory.owners."""
        return _json(await run_in_threadpool(self._directory.owners))

    async def register(self, http: Request) -> Response:
        """See Directory.register."""
        entry = msgspec.json.decode(await _body(http, _MAX_SMALL_BYTES), type=OwnerEntry)
        if entry.instance != http.path_params["instance"]:
            raise ConfigError("the owner's instance is not the one in the address; use one release on both sides")
        return _json(await run_in_threadpool(self._directory.register, entry))

    async def leave(self, http: Request) -> Response:
        """See Directory.leave."""
        await run_in_threadpool(self._directory.leave, http.path_params["instance"])
        return Response(status_code=204)

    async def offer(self, http: Request) -> Response:
        """See Directory.offer."""
        body = await _body(http, MAX_OFFER_BYTES)
        await run_in_threadpool(self._directory.offer, *_named(http), body)
        return Response(status_code=204)

    async def withdraw(self, http: Request) -> Response:
        """See Directory.withdraw."""
        await run_in_threadpool(self._directory.withdraw, *_named(http))
        return Response(status_code=204)

    async def offered(self, http: Request) -> Response:
        """See Directory.offered."""
        try:
            body = await run_in_threadpool(self._directory.offered, *_named(http))
        except ConfigError as error:
            return _error(error, 404)
        return Response(body, media_type="application/json")

    async def offering(self, http: Request) -> Response:
        """See Directory.offering."""
        try:
            return _json(await run_in_threadpool(self._directory.offering, http.query_params.get("version", "")))
        except ConfigError as error:
            return _error(error, 404)


class _TooLarge(ConfigError):
    """A body over its limit."""


async def _body(http: Request, most_bytes: int) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > most_bytes:
            raise _TooLarge(f"expected a body of at most {most_bytes} bytes, got more")
    return bytes(body)


def _named(http: Request) -> tuple[str, str]:
    return http.path_params["instance"], http.path_params["digest"]


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _refuse(_http: Request, error: Exception) -> Response:
    codes = ((_TooLarge, 413), (EngineStateError, 409))
    return _error(error, next((code for kind, code in codes if isinstance(error, kind)), 400))


def _error(error: Exception, code: int) -> Response:
    return JSONResponse({"error": str(error)}, status_code=code)
