"""An agent's way to other hosts' memory: the library, the owners, and slots that are registered once and used by every bucket."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_core.device import Device, HostBytes
from ckpt_core.p2p.covers import covers_of, slot_bytes
from ckpt_core.p2p.fetching import Fetch
from ckpt_core.p2p.incoming_bucket import Leaves
from ckpt_core.p2p.owners import CHUNK_BYTES, Owners
from ckpt_core.p2p.rate import TokenBucket
from ckpt_core.plan import Step
from ckpt_core.polling import Poller
from ckpt_core.relaying import Slots
from ckpt_core.source import SourceIndex
from ckpt_core.stats import AgentStats
from ckpt_core.trace import SpanRecorder
from ckpt_core.transport.base import RingWriter
from ckpt_core.transport.p2p.base import Library, Memory
from ckpt_core.transport.p2p.choice import open_library

_SLOTS = 6


class RemoteSource:
    """Of one version, in one agent.

    Args:
        index: with owners.
        device: slots are made fit for copies to it.
        agent, agents: which of how many on this host; each begins with another owner and has its share of the rate.

    Raises:
        TransportError: the library does not start.
    """

    def __init__(self, index: SourceIndex, device: Device, *, agent: int, agents: int) -> None:
        assert index.remote is not None
        remote = self._remote = index.remote
        self._device, self._agent, self._agents = device, agent, agents
        self._leaves = Leaves(index.extents, remote.leaves)
        self._rate = remote.max_bytes_per_s / agents
        self._library = open_library(Library(remote.owners[0].library), host=remote.host, rdma=remote.rdma)
        self._slots: list[tuple[Slots, Memory]] = []
        self._stranded: list[Slots] = []  # what a silent owner may still write to: freed when the library is closed
        self._fetch: Fetch | None = None

    def fetch(
        self, steps: Sequence[Step], *, writer: RingWriter, poller: Poller, spans: SpanRecorder | None
    ) -> AgentStats:
        """See Fetch."""
        covers = [covers_of(step, self._leaves.extents) for step in steps]
        room = max(map(slot_bytes, covers), default=0)
        self._fetch = Fetch(
            self._leaves,
            steps,
            covers,
            owners=Owners(self._library, self._remote.owners, first=self._agent, readers=self._agents),
            slots=self._room(_SLOTS, room),
            spare=lambda: self._room(1, room)[0],
            writer=writer,
            limit=TokenBucket(self._rate, burst_bytes=CHUNK_BYTES) if self._rate else None,
            spans=spans,
        )
        return self._fetch.run(poller)

    def _room(self, count: int, size_bytes: int) -> list[HostBytes]:
        if not size_bytes:
            return []
        slots = Slots(count, size_bytes, self._device)
        memory = Memory(address=slots.free[0].ctypes.data, size_bytes=count * size_bytes)
        self._library.expose(memory)
        self._slots.append((slots, memory))
        return list(slots.free)

    def free(self) -> None:
        """Give the slots back, when the ring is. Idempotent."""
        stranded = self._fetch is not None and self._fetch.may_still_land()
        while self._slots:
            slots, memory = self._slots.pop()
            if stranded:
                self._stranded.append(slots)
                continue
            self._library.withdraw(memory)
            slots.close()

    def close(self) -> None:
        """End all. Idempotent."""
        self.free()
        self._library.close()
        while self._stranded:
            self._stranded.pop().close()
