"""Reads by Mooncake's transfer engine (kvcache-ai/Mooncake, FAST 2025), without a metadata server.

Its TCP path has truncated data in silence (seen by others): whoever reads compares digests of what arrived.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ckpt_core.errors import PeerLost, TransportError
from ckpt_core.transport.p2p.base import Library, Memory, OneSided, Pending, Read

_HANDSHAKE = "P2PHANDSHAKE"  # peers tell each other what others keep in etcd
_CONTACT = re.compile(r"[^\s/]+:\d{1,5}")
_ARRIVED, _FAILED, _TIMED_OUT = 1, -1, -2


class Mooncake(OneSided):
    """See the module.

    Args:
        host: address of this host, as peers reach it.
        protocol: "rdma", "efa", "ascend" or "tcp".
        devices: names of the NICs to use; all where empty.

    Raises:
        TransportError: it is not installed, or does not start.
    """

    library = Library.MOONCAKE

    def __init__(self, host: str, *, protocol: str = "tcp", devices: Sequence[str] = ()) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise TransportError(
                f"Mooncake cannot be loaded ({error}); pip install mooncake-transfer-engine (on Debian and Ubuntu it needs "
                "apt-get install libibverbs1), or choose nixl"
            ) from error
        self._host = host
        self._engine: Any = TransferEngine()
        if status := self._engine.initialize(host, _HANDSHAKE, protocol, ",".join(devices)):
            raise TransportError(
                f"Mooncake does not start on {host} over {protocol} (status {status}); its log on standard error says why"
            )

    def expose(self, memory: Memory) -> None:
        """See OneSided."""
        if status := self._engine.batch_register_memory([memory.address], [memory.size_bytes]):
            raise TransportError(
                f"Mooncake cannot register {memory.size_bytes} bytes (status {status}): raise the limit of locked memory "
                "(ulimit -l), or expose less"
            )

    def withdraw(self, memory: Memory) -> None:
        """See OneSided."""
        self._engine.batch_unregister_memory([memory.address])

    def contact(self) -> str:
        """See OneSided: host:port."""
        return f"{self._host}:{self._engine.get_rpc_port()}"

    def connect(self, contact: str) -> str:
        """See OneSided. Nothing is sent yet: the first read finds out whether anybody is there."""
        if not _CONTACT.fullmatch(contact):
            raise TransportError(
                f"expected host:port of a Mooncake owner, got {contact!r:.100}; was it made by another library?"
            )
        return contact

    def read(self, owner: str, reads: Sequence[Read]) -> Pending:
        """See OneSided."""
        return _Batches(self._engine, owner, reads)

    def close(self) -> None:
        """See OneSided."""
        self._engine = None


class _Batches(Pending):
    """A batch for each read: of a larger one the library tells only by blocking how it goes."""

    def __init__(self, engine: Any, owner: str, reads: Sequence[Read]) -> None:
        self._engine = engine
        self._owner = owner
        self._open: list[int] = []
        for read in reads:
            batch = engine.batch_transfer_async_read(owner, [read.local], [read.remote], [read.size_bytes])
            if batch in {0, -1, (1 << 64) - 1}:
                raise self._lost("refused")
            self._open.append(batch)

    def arrived(self) -> bool:
        """See Pending."""
        while self._open:
            status = self._engine.transfer_check_status(self._open[-1])
            if status in {_FAILED, _TIMED_OUT}:
                raise self._lost("failed" if status == _FAILED else "timed out")
            if status != _ARRIVED:
                return False
            self._open.pop()
        return True

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(
            f"a read from {self._owner} {what}: the owner is gone, cannot be reached, or does not expose that memory any more; "
            "read from another one"
        )
