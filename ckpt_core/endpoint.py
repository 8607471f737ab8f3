"""The control side's handle on one engine instance: its address, its HTTP client, or the engine object itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from ckpt_core.errors import EngineError, EngineStateError, EngineUnavailable

HTTP_CONFLICT = 409
HTTP_LOCKED = 423


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """How to talk to an engine.

    Attributes:
        timeout_s: deadline of a short call; attach has its own, in the rendezvous.
        pause_timeout_s: deadline of a pause, which may wait for requests.
        bearer_token: sent as `Authorization: Bearer`; empty for none.
        verify_tls: check the server's certificate.
    """

    timeout_s: float = 30.0
    pause_timeout_s: float = 120.0
    bearer_token: str = field(default="", repr=False)
    verify_tls: bool = True


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """One engine instance.

    Attributes:
        url: base URL of its server; any unique label where `handle` is used.
        engine: name of the plugin that serves it.
        options: see EndpointOptions.
        handle: the engine object, for engines in this process; plugins look at it first.
        notes: what the plugin wants to remember of this instance between hooks.
    """

    url: str
    engine: str
    options: EndpointOptions = field(default_factory=EndpointOptions)
    handle: Any = None
    notes: dict[str, object] = field(default_factory=dict, repr=False)
    _client: httpx.Client | None = None

    def __str__(self) -> str:
        return f"{self.engine} at {self.url}"

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """One HTTP call; returns the response of a 2xx status.

        Raises:
            EngineUnavailable: nothing answers, or not in time, or 404 or 503.
            EngineStateError: 409 or 423: refused in the engine's present state.
            EngineError: any other status.
        """
        try:
            response = self._http().request(
                method, path, json=json, params=params, timeout=timeout_s or self.options.timeout_s
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineUnavailable(
                f"{self}: {method} {path} got no answer ({type(error).__name__}: {error}); is the server up, "
                "and is this its address?"
            ) from error
        if response.is_success:
            return response
        raise _error_of(self, method, path, response)

    def close(self) -> None:
        """Close the HTTP client; the endpoint can be used again afterwards."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _http(self) -> httpx.Client:
        if self._client is None:
            headers = {}
            if self.options.bearer_token:
                headers["Authorization"] = f"Bearer {self.options.bearer_token}"
            # no proxies from the environment: engines are addressed directly
            self._client = httpx.Client(
                base_url=self.url, headers=headers, verify=self.options.verify_tls, trust_env=False
            )
        return self._client


def _error_of(endpoint: Endpoint, method: str, path: str, response: httpx.Response) -> EngineError:
    text = f"{endpoint}: {method} {path} answered {response.status_code}: {response.text[:500]}"
    if response.status_code in (HTTP_CONFLICT, HTTP_LOCKED):
        return EngineStateError(text)
    if response.status_code in (404, 503):
        return EngineUnavailable(text)
    return EngineError(text)
