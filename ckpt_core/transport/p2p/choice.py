"""Which library of one-sided reads is opened: what is installed decides, and what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ckpt_core.errors import ConfigError
from ckpt_core.transport.p2p.base import Library, OneSided
from ckpt_core.transport.p2p.mooncake import Mooncake
from ckpt_core.transport.p2p.nixl import MODULES, Nixl


def installed() -> tuple[Library, ...]:
    """Those that can be imported, best first: UCX picks RDMA, shared memory or TCP by itself."""
    found = [Library.NIXL] if any(find_spec(name.partition(".")[0]) for name in MODULES) else []
    return (*found, Library.MOONCAKE) if find_spec("mooncake") else tuple(found)


def choose(asked: Library | None = None) -> Library:
    """The one asked for, else the best that is installed.

    Raises:
        ConfigError: it is not installed, or none is.
    """
    found = installed()
    if asked is None and found:
        return found[0]
    if asked is not None and asked in found:
        return asked
    raise ConfigError(
        f"expected {asked.value if asked else 'a library of one-sided reads'}, got {[one.value for one in found]}; "
        "pip install nixl-cu12 or mooncake-transfer-engine"
    )


def open_library(library: Library, *, host: str, rdma: Sequence[str] = (), serves: bool = False) -> OneSided:
    """Start it in this process.

    Args:
        host: address of this host, as others reach it.
        rdma: names of RDMA devices to use; TCP where there are none.
        serves: whether others read here.

    Raises:
        TransportError: it does not start.
    """
    if library is Library.MOONCAKE:
        return Mooncake(host, protocol="rdma" if rdma else "tcp", devices=rdma)
    return Nixl(devices=[f"{name}:1" for name in rdma], serves=serves)
