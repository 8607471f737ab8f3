"""Reads of a version by Mooncake and by NIXL as their own users write them, with none of our code: what ours is compared with."""

from __future__ import annotations

import base64
import importlib
import itertools
import mmap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from ckpt_core.manifest import TensorMeta
from ckpt_core.p2p.offers import Offer
from ckpt_core.transport.p2p.base import Library
from ckpt_core.transport.p2p.nixl import MODULES

Region = tuple[int, int]  # address in the owner, bytes


class Own(Protocol):
    """A library that reads an offer into registered memory; both return when all is there."""

    def one(self) -> None:
        """In one read."""

    def batch(self) -> None:
        """In one call with a read per tensor."""


class OwnMooncake:
    """The calls that block in the library."""

    def __init__(self, offer: Offer) -> None:
        from mooncake.engine import TransferEngine

        self._owner, self._regions = offer.contact, regions_of(offer)
        self._memory = memory_for(self._regions)
        self._engine: Any = TransferEngine()
        assert not self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        assert not self._engine.register_memory(self._memory.ctypes.data, self._memory.size)

    def one(self) -> None:
        """See Own."""
        remote = self._regions[0][0]
        assert not self._engine.transfer_sync_read(self._owner, self._memory.ctypes.data, remote, self._memory.size)

    def batch(self) -> None:
        """See Own."""
        remote, sizes = [address for address, _ in self._regions], [size for _, size in self._regions]
        assert not self._engine.batch_transfer_sync_read(self._owner, places(self._memory, sizes), remote, sizes)


class OwnNixl:
    """A transfer that is looked at until it is done. No thread of the library: it would take a core from the owner."""

    def __init__(self, offer: Offer) -> None:
        api = importlib.import_module(next(name for name in MODULES if find_spec(name.partition(".")[0])))
        self._regions = regions_of(offer)
        self._memory = memory_for(self._regions)
        self._agent: Any = api.nixl_agent("benchmark", api.nixl_agent_config(False, backends=["UCX"]))
        self._agent.register_memory([(self._memory.ctypes.data, self._memory.size, 0, "")], "DRAM")
        self._owner = self._agent.add_remote_agent(base64.b64decode(offer.contact)).decode()

    def one(self) -> None:
        """See Own."""
        self._read([(self._regions[0][0], self._memory.size)])

    def batch(self) -> None:
        """See Own."""
        self._read(self._regions)

    def _read(self, regions: Sequence[Region]) -> None:
        sizes = [size for _, size in regions]
        local = [(at, size, 0) for at, size in zip(places(self._memory, sizes), sizes, strict=True)]
        remote = [(address, size, 0) for address, size in regions]
        descriptors = [self._agent.get_xfer_descs(part, "DRAM") for part in (local, remote)]
        handle = self._agent.initialize_xfer("READ", *descriptors, self._owner)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        assert state == "DONE", state
        self._agent.release_xfer_handle(handle)


OWN: dict[Library, Callable[[Offer], Own]] = {Library.MOONCAKE: OwnMooncake, Library.NIXL: OwnNixl}


def regions_of(offer: Offer) -> list[Region]:
    """Of all tensors, which follow each other."""
    sizes = [TensorMeta(name=one.name, dtype=one.dtype, shape=one.shape).size_bytes for one in offer.tensors]
    regions = [(one.address, size) for one, size in zip(offer.tensors, sizes, strict=True)]
    assert all(address + size == after for (address, size), (after, _) in itertools.pairwise(regions))
    return regions


def memory_for(regions: Sequence[Region]) -> np.ndarray:
    """As much, written once."""
    memory = np.frombuffer(mmap.mmap(-1, sum(size for _, size in regions)), dtype=np.uint8)
    memory[:] = 1
    return memory


def places(memory: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Addresses of parts that follow each other."""
    return [int(memory.ctypes.data) + sum(sizes[:number]) for number in range(len(sizes))]
