"""Several hosts on one machine: network namespaces on a bridge, each with a link of a given rate. Needs root and iproute2.

They share files, memory and processors, but no network: what goes between them crosses their links, whose counters say how much.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_TIMEOUT_S = 20.0
# tbf: a bucket of some segments as the kernel hands them down (64 KiB each), and a queue of some milliseconds
_BURST_BYTES = 256 << 10
_QUEUE_MS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NetHost:
    """One of them.

    Attributes:
        name: of its namespace.
        address: IPv4.
        link: name of the bridge's end of its link.
    """

    name: str
    address: str
    link: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command on this host."""
        return ("ip", "netns", "exec", self.name)

    def bytes_in(self) -> int:
        """Bytes that came in over its link so far, with headers."""
        return self._counter("tx_bytes")

    def bytes_out(self) -> int:
        """Bytes that went out."""
        return self._counter("rx_bytes")

    def cut_off(self) -> None:
        """Take its link down: nothing goes in or out, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def connect(self) -> None:
        """Bring its link up again."""
        _ip("link", "set", self.link, "up")

    def _counter(self, name: str) -> int:
        return int(Path(f"/sys/class/net/{self.link}/statistics/{name}").read_text())


class NetHosts:
    """A context manager that makes them, and removes them with all that runs on them gone.

    Args:
        count: how many.
        mbit_s: rate of each link, each way; one for all, or one for each.

    Attributes:
        hosts: by number.
        gateway: address of this process on their network.
    """

    def __init__(self, count: int, *, mbit_s: int | Sequence[int]) -> None:
        self._rates = [mbit_s] * count if isinstance(mbit_s, int) else list(mbit_s)
        assert len(self._rates) == count
        self._stack = ExitStack()
        self.hosts: tuple[NetHost, ...] = ()
        self.gateway = ""

    def __enter__(self) -> NetHosts:
        tag = secrets.token_hex(3)
        subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        bridge = f"ck{tag}"
        self.gateway = f"{subnet}.254"
        with self._stack:
            _ip("link", "add", bridge, "type", "bridge")
            self._stack.callback(_ip, "link", "del", bridge)
            _ip("addr", "add", f"{self.gateway}/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            self.hosts = tuple(
                self._add(f"ck{tag}-{number}", f"{subnet}.{number + 1}", bridge, rate)
                for number, rate in enumerate(self._rates)
            )
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _add(self, name: str, address: str, bridge: str, mbit_s: int) -> NetHost:
        link = f"{name}l"
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", bridge, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _limit(("tc",), link, mbit_s)
        _limit(("tc", "-n", name), "eth0", mbit_s)
        return NetHost(name=name, address=address, link=link)


def refusal() -> str:
    """Why there can be none here; "" where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc (iproute2) are not installed"
    try:
        with NetHosts(1, mbit_s=1000):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"


def _limit(tc: tuple[str, ...], device: str, mbit_s: int) -> None:
    queue = f"latency {_QUEUE_MS}ms".split()
    shape = ["tbf", "rate", f"{mbit_s}mbit", "burst", str(_BURST_BYTES), *queue]
    _run((*tc, "qdisc", "add", "dev", device, "root", *shape))


def _ip(*arguments: str) -> None:
    _run(("ip", *arguments))


def _run(command: tuple[str, ...]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
