"""One token for all calls of an HTTP server."""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class BearerGuard:
    """Refuses requests without the token; /health stays open for load balancers.

    Args:
        hint: what somebody without it should do.
    """

    def __init__(self, app: ASGIApp, token: str, *, hint: str = "send Authorization: Bearer TOKEN") -> None:
        self._app, self._expected, self._hint = app, f"Bearer {token}".encode(), hint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        public = scope["type"] != "http" or scope["path"] == "/health"
        if public or secrets.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        body = {"error": f"missing or wrong bearer token; {self._hint}"}
        await JSONResponse(body, status_code=401)(scope, receive, send)
