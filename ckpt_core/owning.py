"""An owner: versions of this host that those who join may read, told by files or by a directory."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from ckpt_core.config import Environment
from ckpt_core.directory_client import DirectoryClient
from ckpt_core.errors import CkptError
from ckpt_core.history import History
from ckpt_core.lease import Lease
from ckpt_core.p2p.exporting import exported
from ckpt_core.p2p.nics import NicKind, nics_here
from ckpt_core.p2p.offers import Offer
from ckpt_core.pool_file import stage_tensors
from ckpt_core.shm import private_directory, remove_directory
from ckpt_core.source import SourceIndex, open_checkpoint
from ckpt_core.transport.p2p.base import Library
from ckpt_core.transport.p2p.choice import choose, open_library

if TYPE_CHECKING:
    import torch

    Checkpoint = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, torch.Tensor] | SourceIndex

_log = logging.getLogger(__name__)


class Owner:
    """A context manager; what it offers ends with it. Not for several threads at once.

    Args:
        host: address of this host, as the others reach it.
        name: tells several owners of a host apart.
        library: by default what is installed.
        rdma: RDMA devices to use; by default those that CKPT_NICS, or NCCL_IB_HCA, leaves.
        max_bytes_per_s: that each host which joins may read here; 0 for no limit.
        directory: URL of `ckpt serve`, where those who join find it.
        lease_s: the directory takes it for gone when it heard nothing for so long.

    Raises:
        ConfigError: no library, or no such NICs.
        TransportError: the library does not start.
        EngineError: the directory does not answer, or refuses.
    """

    def __init__(
        self,
        *,
        host: str,
        name: str = "",
        library: Library | None = None,
        rdma: Sequence[str] = (),
        max_bytes_per_s: float = 0.0,
        directory: str = "",
        lease_s: float = 10.0,
    ) -> None:
        self._name = name or socket.gethostname()
        self._nics = nics_here(",".join(rdma))
        self._max_bytes_per_s = max_bytes_per_s
        self._offers: dict[str, tuple[Offer, ExitStack]] = {}
        self._lease: Lease | None = None
        with ExitStack() as stack:
            devices = [nic.name for nic in self._nics if nic.kind is NicKind.RDMA]
            self._library = open_library(choose(library), host=host, rdma=rdma or devices, serves=True)
            stack.callback(self._library.close)
            stack.callback(self._withdraw_all)
            if directory:
                client = stack.enter_context(DirectoryClient(directory))
                lease = Lease(client, name=self._name, address=f"{host}/{self._name}", lease_s=lease_s)
                self._lease = stack.enter_context(lease)
            self._stack = stack.pop_all()

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def replaced(self) -> bool:
        """Whether the directory knows a later owner at this address: nobody is sent here any more."""
        return self._lease is not None and self._lease.replaced

    @property
    def library(self) -> Library:
        """That moves the bytes."""
        return self._library.library

    @property
    def digests(self) -> frozenset[str]:
        """Of what is offered now."""
        return frozenset(self._offers)

    def publish(self, checkpoint: Checkpoint, *, version: str = "") -> Offer:
        """Offer a version from now on. Reads all of it once, for the digests of its leaves.

        Args:
            checkpoint: a safetensors directory, file or list of files, its index, or named tensors: these are copied.
            version: label; by default the start of the content digest.

        Raises:
            ConfigError: the version is not in files.
            CapacityError: no room for a copy of tensors.
            TransportError: the library refuses the memory.
        """
        with ExitStack() as stack:
            index = _index(checkpoint, stack)
            offer = stack.enter_context(
                exported(
                    index,
                    self._library,
                    owner=self._name,
                    version=version,
                    nics=self._nics,
                    max_bytes_per_s=self._max_bytes_per_s,
                )
            )
            if offer.digest not in self._offers:
                self._offers[offer.digest] = offer, stack.pop_all()
        return self._told(offer.digest, version)

    def _told(self, digest: str, version: str) -> Offer:
        """The directory knows it, by its newest label."""
        offer, stack = self._offers[digest]
        if version and version != offer.version:
            offer = msgspec.structs.replace(offer, version=version)
            self._offers[digest] = offer, stack
        if self._lease is not None:
            self._lease.offer(offer)
        return offer

    def withdraw(self, digest: str) -> None:
        """Not any more; whoever reads it now must go on with others."""
        if self._lease is not None:
            self._lease.withdraw(digest)
        self._offers.pop(digest)[1].close()

    def _withdraw_all(self) -> None:
        """The lease has ended."""
        while self._offers:
            self._offers.popitem()[1][1].close()

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


def _index(checkpoint: Checkpoint, stack: ExitStack) -> SourceIndex:
    """What is copied for it ends with the stack."""
    if isinstance(checkpoint, SourceIndex):
        return checkpoint
    if not isinstance(checkpoint, Mapping):
        return open_checkpoint(checkpoint)
    directory = private_directory(Environment.read().memory_root, "ckpt-owner-")
    stack.callback(remove_directory, directory)
    return stage_tensors(checkpoint, directory)
