"""The control side's handle on one engine instance: its address, its HTTP client, or the engine object itself."""

from __future__ import annotations

import ipaddress
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from ckpt_core.config import Environment
from ckpt_core.errors import ConfigError, EngineError, EngineStateError, EngineUnavailable

HTTP_CONFLICT = 409
HTTP_LOCKED = 423
MAX_ANSWER_BYTES = 64 << 20
# Servers of engines (uvicorn) close a connection that was idle for 5 s. A request that is sent at that moment is lost, and nobody
# knows whether it was heard: it cannot be sent again. So connections that were idle for a second are not used any more.
KEPT_ALIVE = httpx.Limits(keepalive_expiry=1.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """How to talk to an engine.

    Attributes:
        timeout_s: deadline of a short call; attach has its own, in the rendezvous.
        pause_timeout_s: deadline of a pause, which may wait for requests.
        bearer_token: sent as `Authorization: Bearer`; empty for none.
        verify_tls: check the server's certificate.
        ca_file: PEM bundle of those who may sign it; "" for the usual ones.
        client_cert, client_key: PEM files by which this side proves itself; "" for none, and for a key that is in the
            certificate's file. The key must not be encrypted.
        max_answer_bytes: what is longer is refused.

    Raises:
        ConfigError: options that exclude each other.
    """

    timeout_s: float = 30.0
    pause_timeout_s: float = 120.0
    bearer_token: str = field(default="", repr=False)
    verify_tls: bool = True
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""
    max_answer_bytes: int = MAX_ANSWER_BYTES

    def __post_init__(self) -> None:
        if self.client_key and not self.client_cert:
            raise ConfigError("client_key (CKPT_CLIENT_KEY) is of no use without client_cert (CKPT_CLIENT_CERT)")
        if self.ca_file and not self.verify_tls:
            raise ConfigError(
                "ca_file (CKPT_CA_FILE) says whom to trust, and verify_tls=False trusts everybody; drop one"
            )

    @classmethod
    def of(cls, environment: Environment, *, pause_timeout_s: float = 120.0) -> EndpointOptions:
        """What the environment says of calls to engines."""
        return cls(
            pause_timeout_s=pause_timeout_s,
            bearer_token=environment.bearer_token,
            ca_file=environment.ca_file,
            client_cert=environment.client_cert,
            client_key=environment.client_key,
        )


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
        """One HTTP call; returns the response of a 2xx status. Redirects are not followed: they could lead the token astray.

        Raises:
            EngineUnavailable: nothing answers, or not in time, or 404 or 503.
            EngineStateError: 409 or 423: refused in the engine's present state.
            EngineError: any other status, or an answer that is too large or packed.
            ConfigError: a certificate or key cannot be used.
        """
        timeout_s = timeout_s or self.options.timeout_s
        try:
            with self._http().stream(method, path, json=json, params=params, timeout=timeout_s) as stream:
                body = _read(self, f"{method} {path}", stream, timeout_s)
                response = httpx.Response(
                    stream.status_code, headers=stream.headers, content=body, request=stream.request
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
            headers = {"Accept-Encoding": "identity"}  # a packed answer could be a thousand times what it seems
            if self.options.bearer_token:
                headers["Authorization"] = f"Bearer {self.options.bearer_token}"
                _warn_of_plain_http(self.url)
            # no proxies from the environment: engines are addressed directly
            self._client = httpx.Client(
                base_url=self.url,
                headers=headers,
                verify=_trust(self.options),
                trust_env=False,
                follow_redirects=False,
                limits=KEPT_ALIVE,
            )
        return self._client


def _trust(options: EndpointOptions) -> ssl.SSLContext | bool:
    """Whom to trust, and what to show them.

    Raises:
        ConfigError: a file cannot be used.
    """
    if not options.ca_file and not options.client_cert:
        return options.verify_tls
    try:
        if options.ca_file:
            context = ssl.create_default_context(cafile=options.ca_file)
        else:
            context = httpx.create_ssl_context(verify=options.verify_tls, trust_env=False)
    except OSError as error:
        raise ConfigError(
            f"ca_file (CKPT_CA_FILE) {options.ca_file}: expected a bundle of certificates in PEM, got: {error}"
        ) from error
    if options.client_cert:
        try:
            # a password is never asked for: nobody may be there to give it
            context.load_cert_chain(options.client_cert, options.client_key or None, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"client_cert (CKPT_CLIENT_CERT) {options.client_cert} and client_key (CKPT_CLIENT_KEY) "
                f"{options.client_key or 'in the same file'}: expected a certificate and its unencrypted key in PEM, got: {error}"
            ) from error
    return context


@lru_cache(maxsize=1024)  # once for each engine
def _warn_of_plain_http(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return  # the call itself says so
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        _log.warning(
            "the bearer token goes to %s over plain http: whoever listens on that network can take it; use https there",
            url,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(endpoint: Endpoint, call: str, response: httpx.Response, timeout_s: float) -> bytes:
    """The body, as far as it is small and comes in time: httpx's own deadline is for each part of it."""
    packed = response.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        raise EngineError(f"{endpoint}: {call} answered with content-encoding {packed!r:.50}, which nobody asked for")
    body = bytearray()
    deadline = time.monotonic() + timeout_s
    for part in response.iter_bytes():
        body += part
        if len(body) > endpoint.options.max_answer_bytes:
            raise EngineError(
                f"{endpoint}: {call} answered with more than {endpoint.options.max_answer_bytes} bytes; "
                "is this an engine's server?"
            )
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout(f"the answer was not complete after {timeout_s:g} s", request=response.request)
    return bytes(body)


def _error_of(endpoint: Endpoint, method: str, path: str, response: httpx.Response) -> EngineError:
    text = f"{endpoint}: {method} {path} answered {response.status_code}: {response.text[:500]}"
    if response.status_code in (HTTP_CONFLICT, HTTP_LOCKED):
        return EngineStateError(text)
    if response.status_code in (404, 503):
        return EngineUnavailable(text)
    return EngineError(text)
