"""An owner: versions of this host that those who join may read, told by files or by a directory."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from ckpt_core.config import Environment
from ckpt_core.errors import CkptError
from ckpt_core.history import History
from ckpt_core.lease import Lease
from ckpt_core.p2p.exporting import exported
from ckpt_core.p2p.nics import Nic, NicKind, discover
from ckpt_core.p2p.offers import Offer
from ckpt_core.source import SourceIndex
from ckpt_core.transport.p2p.base import Library
from ckpt_core.transport.p2p.choice import choose, open_library

_log = logging.getLogger(__name__)


class Owner:
    """A context manager; what it offers ends with it. Not for several threads at once.

    Args:
        host: address of this host, as the others reach it.
        name: tells several owners of a host apart.
        library: by default what is installed.
        rdma: RDMA devices to use; by default those that CKPT_NICS, or NCCL_IB_HCA, leaves.
        max_bytes_per_s: that each host which joins may read here; 0 for no limit.

    Raises:
        ConfigError: no library, or no such NICs.
        TransportError: the library does not start.
    """

    def __init__(
        self,
        *,
        host: str,
        name: str = "",
        library: Library | None = None,
        rdma: Sequence[str] = (),
        max_bytes_per_s: float = 0.0,
    ) -> None:
        self.name = name or socket.gethostname()
        self._nics = _nics(rdma)
        self._max_bytes_per_s = max_bytes_per_s
        devices = [nic.name for nic in self._nics if nic.kind is NicKind.RDMA]
        self._library = open_library(choose(library), host=host, rdma=rdma or devices, serves=True)
        self._offers: dict[str, tuple[Offer, ExitStack]] = {}
        self.lease: Lease | None = None

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lease = None  # it has ended, or ends with all that it offers
        for digest in [*self._offers]:
            self.withdraw(digest)
        self._library.close()

    @property
    def library(self) -> Library:
        """That moves the bytes."""
        return self._library.library

    @property
    def digests(self) -> frozenset[str]:
        """Of what is offered now."""
        return frozenset(self._offers)

    def publish(self, index: SourceIndex, *, version: str = "") -> Offer:
        """Offer a version from now on. Reads all of it once, for the digests of its leaves.

        Raises:
            ConfigError: the version is not in files.
            TransportError: the library refuses the memory.
        """
        with ExitStack() as stack:
            offer = stack.enter_context(
                exported(
                    index,
                    self._library,
                    owner=self.name,
                    version=version,
                    nics=self._nics,
                    max_bytes_per_s=self._max_bytes_per_s,
                )
            )
            if offer.digest in self._offers:
                return self._offers[offer.digest][0]
            self._offers[offer.digest] = offer, stack.pop_all()
        if self.lease is not None:
            self.lease.offer(offer)
        return offer

    def withdraw(self, digest: str) -> None:
        """Not any more; whoever reads it now must go on with others."""
        if self.lease is not None:
            self.lease.withdraw(digest)
        self._offers.pop(digest)[1].close()

    def follow(self, history: History) -> None:
        """Offer the versions that are warm on this host now, and only those."""
        warm = {record.digest: record for record in history.pool.versions() if history.pool.warm(record)}
        for digest in self.digests - warm.keys():
            self.withdraw(digest)
        for digest in warm.keys() - self.digests:
            try:
                self.publish(history.pool.index_of(digest), version=warm[digest].label)
            except CkptError as error:  # it went meanwhile
                _log.warning("version %s is not offered: %s", warm[digest].label or digest, error)


def _nics(rdma: Sequence[str]) -> tuple[Nic, ...]:
    environment = Environment.read()
    return discover(own=",".join(rdma) or environment.nics, nccl=environment.nccl_ib_hca)
