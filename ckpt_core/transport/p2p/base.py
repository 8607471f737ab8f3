"""What a library of one-sided reads must do for us, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Library(Enum):
    """Which library moves the bytes."""

    MOONCAKE = "mooncake"  # mooncake-transfer-engine: RDMA, EFA, Ascend, TCP
    NIXL = "nixl"  # NVIDIA NIXL over UCX: RDMA, shared memory, TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A region of this process's memory.

    Attributes:
        address, size_bytes: where it is.
        gpu: CUDA ordinal of the device that it is on; None for host memory.
    """

    address: int
    size_bytes: int
    gpu: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes to fetch: `size_bytes` from `remote` in the owner's process to `local` in this one. Both are exposed memory."""

    local: int
    remote: int
    size_bytes: int


class Pending(Protocol):
    """Reads that are on their way.

    What is given up before it ended may still arrive: its memory is not to be used again while the library is open.
    """

    def arrived(self) -> bool:
        """Whether all bytes are there. Never waits.

        Raises:
            PeerLost: they will not come: the owner is gone, or does not expose that memory.
        """


class OneSided(Protocol):
    """One library, open in this process. Not for several threads at once.

    Attributes:
        library: which.
    """

    library: Library

    def expose(self, memory: Memory) -> None:
        """Register a region: others may read it, reads may land in it. Costs time per page: few and large, once.

        Raises:
            TransportError: the library refuses it.
        """

    def withdraw(self, memory: Memory) -> None:
        """The opposite. The memory must still be there."""

    def contact(self) -> str:
        """How others reach what is exposed until now: ASCII, for a directory or a file."""

    def connect(self, contact: str) -> str:
        """The name under which the owner behind that contact is known from now on.

        Raises:
            PeerLost: it cannot be reached.
            TransportError: that is no contact of this library.
        """

    def read(self, owner: str, reads: Sequence[Read]) -> Pending:
        """Begin to fetch.

        Raises:
            PeerLost: the owner is gone, or does not expose that memory.
        """

    def close(self) -> None:
        """End all; nothing may be on its way. Idempotent."""
