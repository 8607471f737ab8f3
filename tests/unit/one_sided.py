"""A stand-in for a library of one-sided reads: the "network" is memmove in this process, with faults on order."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_core.errors import PeerLost, TransportError
from ckpt_core.transport.p2p.base import Library, Memory, OneSided, Pending, Read


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong with an owner.

    Attributes:
        dies_after: reads that it still serves; None: it lives.
        flips: one bit of every read.
        stalls: reads neither come nor fail.
        slow: looks at a read until it is there.
        takes_s: how long a read is on its way.
    """

    dies_after: int | None = None
    flips: bool = False
    stalls: bool = False
    slow: int = 0
    takes_s: float = 0.0


class FakeOneSided(OneSided):
    """By contact: what is wrong with that owner. Reads outside of exposed memory are refused, as the real ones do."""

    library = Library.NIXL

    def __init__(self, faults: dict[str, Fault] | None = None, *, contact: str = "") -> None:
        self.faults = faults or {}
        self.exposed: list[Memory] = []
        self.read_bytes: dict[str, int] = {}
        self.most_on_way = 0
        self._contact = contact

    def expose(self, memory: Memory) -> None:
        self.exposed.append(memory)

    def withdraw(self, memory: Memory) -> None:
        self.exposed.remove(memory)

    def contact(self) -> str:
        return self._contact

    def connect(self, contact: str) -> str:
        if contact not in self.faults:
            raise TransportError(f"no contact: {contact}")
        return contact

    def read(self, owner: str, reads: Sequence[Read]) -> Pending:
        fault = self.faults[owner]
        if fault.dies_after == 0:
            raise PeerLost(f"{owner} is gone")
        if fault.dies_after is not None:
            fault.dies_after -= 1
        for read in reads:
            if not any(
                memory.address <= read.local and read.local + read.size_bytes <= memory.address + memory.size_bytes
                for memory in self.exposed
            ):
                raise TransportError("that memory is not exposed")
            self.read_bytes[owner] = self.read_bytes.get(owner, 0) + read.size_bytes
        return _Arriving(fault, owner, reads)

    def close(self) -> None:
        self.exposed.clear()


class _Arriving(Pending):
    def __init__(self, fault: Fault, owner: str, reads: Sequence[Read]) -> None:
        self._fault, self._owner, self._reads = fault, owner, reads
        self._looks = fault.slow
        self._there_at = time.monotonic() + fault.takes_s

    def arrived(self) -> bool:
        if self._fault.dies_after == 0:
            raise PeerLost(f"{self._owner} is gone")
        self._looks -= 1
        if self._fault.stalls or self._looks >= 0 or time.monotonic() < self._there_at:
            return False
        for read in self._reads:
            ctypes.memmove(read.local, read.remote, read.size_bytes)
            if self._fault.flips:
                ctypes.c_uint8.from_address(read.local + read.size_bytes // 2).value ^= 0x10
        return True
