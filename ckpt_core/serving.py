"""The process of `ckpt serve`: the directory on the store of this host's controllers, behind uvicorn."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from ckpt_core.config import Environment
from ckpt_core.directory import Directory
from ckpt_core.directory_server import DirectoryServer
from ckpt_core.errors import ConfigError
from ckpt_core.history import History

_STOP_WITHIN_S = 5


def serve_directory(
    listen: str, *, tls_cert: Path | None, tls_key: Path | None, announce: Callable[[str], None]
) -> None:
    """Answer until SIGTERM or SIGINT.

    Args:
        listen: host:port; port 0 takes a free one.
        announce: told the URL as soon as it listens.

    Raises:
        ConfigError: no such address, or nothing secret where others could reach it.
    """
    environment = Environment.read()
    history = History.of(environment)
    listener = _listener(listen)
    host, port = listener.getsockname()[:2]
    if not environment.directory_token and not ipaddress.ip_address(host).is_loopback:
        raise ConfigError(
            f"others reach {host}: whoever calls could name owners of their own; set CKPT_DIRECTORY_TOKEN to a secret, "
            "here and where engines join"
        )
    app = DirectoryServer(Directory(history.store)).app(environment.directory_token)
    announce(f"{'https' if tls_cert else 'http'}://{host}:{port}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        timeout_graceful_shutdown=_STOP_WITHIN_S,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes them, and hands them on when it has ended
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        history.close()


def _listener(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"expected host:port to listen at, got {listen!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), int(port)))
        listener.listen()  # from now on calls wait, also before the server takes them
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {listen!r} ({error.strerror}); choose another address") from error
    return listener
