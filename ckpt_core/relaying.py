"""The loop of an agent that has neighbours on other hosts: fill the ring, take in, pass on; nothing in it waits for one thing.

A bucket that comes in gets a slot of host memory. It is freed when the ring has it and all who are to get it next have it, so that
a slow rank and a slow neighbour do not hold up each other. Slots are given in the order of the plan: see `routing.host_plans`.
"""

from __future__ import annotations

import mmap
import select
import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from ckpt_core.bucket import Bucket
from ckpt_core.device import Device, HostBytes, Unlock
from ckpt_core.errors import CapacityError
from ckpt_core.manifest import Manifest
from ckpt_core.pipeline import Outgoing
from ckpt_core.polling import Poller
from ckpt_core.relay import FROM_POOL, Departure, Relay
from ckpt_core.staging import HostPool
from ckpt_core.stats import AgentStats
from ckpt_core.trace import SpanRecorder, SpanStage, Unrecorded
from ckpt_core.transport.base import RingWriter
from ckpt_core.transport.chain import Inlet, Outlet

_NAP_S = 500e-6
_FEWEST_SLOTS = 4


class Slots:
    """Host memory for buckets that come in.

    Args:
        count, size_bytes: how many, and of which size.
        device: made fit for copies to it.
    """

    def __init__(self, count: int, size_bytes: int, device: Device) -> None:
        self.free: list[HostBytes] = []
        self._memory: HostBytes | None = None  # it must not go before it is unlocked
        self._unlock: Unlock | None = None
        if count:
            # shared, though nobody shares it: private pages are locked at a tenth of the speed
            try:
                memory = np.frombuffer(mmap.mmap(-1, count * max(size_bytes, 1)), dtype=np.uint8)
            except OSError as error:
                raise CapacityError(
                    f"no room for {count} buckets of {size_bytes} bytes on their way between hosts ({error.strerror}); free "
                    "memory, or take smaller buckets"
                ) from error
            self._unlock = device.lock(memory)
            self._memory = memory
            self.free = list(memory.reshape(count, -1))

    def close(self) -> None:
        """Give the memory back, when no copy out of it is in flight any more. Idempotent."""
        self.free.clear()
        unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()
        self._memory = None


def slots_for(outgoing: Outgoing, relay: Relay, device: Device) -> Slots:
    """Memory for what comes in by that relay."""
    sizes = {step.seq: step.bucket.size_bytes for step in outgoing.steps}
    largest = max((sizes[arrival.seq] for arrival in relay.arrivals), default=0)
    return Slots(slot_count(relay), largest, device)


def slot_count(relay: Relay) -> int:
    """As many as the plan needs, and some more so that nobody waits for a neighbour's turn."""
    return min(max(2 * relay.slots, _FEWEST_SLOTS), len(relay.arrivals))


def relay_all(
    outgoing: Outgoing,
    relay: Relay,
    *,
    inlets: Sequence[Inlet],
    outlets: Sequence[Outlet],
    slots: Slots,
    writer: RingWriter,
    pool: HostPool,
    manifest: Manifest,
    poller: Poller,
    spans: SpanRecorder | None = None,
) -> AgentStats:
    """Carry out an agent's part: returns when its ranks have read all, and its neighbours have what they were to get.

    Raises:
        PeerLost: a neighbour is gone.
        TransportError: what came in is not what was sent.
    """
    loop = _Loop(outgoing, relay, inlets, outlets, slots, writer, pool, manifest, spans or Unrecorded())
    start = time.perf_counter()
    while not loop.finished():
        if not loop.turn():
            loop.idle()
        poller.check_now_and_then(loop.waits_for())
    return loop.stats(time.perf_counter() - start)


class _Arrived:
    """A bucket in a slot, and how many still need it there."""

    def __init__(self, slot: HostBytes, size_bytes: int, uses: int) -> None:
        self.slot = slot
        self.bytes: HostBytes = slot[:size_bytes]
        self.digest: int | None = None  # once it is complete
        self.uses = uses


class _Loop:
    """What is where; see `relay_all`."""

    def __init__(  # noqa: PLR0917
        self,
        outgoing: Outgoing,
        relay: Relay,
        inlets: Sequence[Inlet],
        outlets: Sequence[Outlet],
        slots: Slots,
        writer: RingWriter,
        pool: HostPool,
        manifest: Manifest,
        spans: SpanRecorder,
    ) -> None:
        self._outgoing, self._relay = outgoing, relay
        self._inlets, self._outlets, self._slots = inlets, outlets, slots
        self._writer, self._pool, self._manifest, self._spans = writer, pool, manifest, spans
        self._sizes = {step.seq: step.bucket.size_bytes for step in outgoing.steps}
        self._uses = {arrival.seq: 1 for arrival in relay.arrivals}
        for departure in relay.departures:
            if departure.seq != FROM_POOL:
                self._uses[departure.seq] += 1
        self._granted = 0
        self._expected: list[deque[int]] = [deque() for _ in inlets]
        self._held: dict[int, _Arrived] = {}
        self._departures: list[deque[Departure]] = [deque() for _ in outlets]
        for departure in relay.departures:
            self._departures[departure.outlet].append(departure)
        self._leaving: list[Departure | None] = [None] * len(outlets)
        self._packs = [_room(departures) for departures in self._departures]
        self._filled = 0
        self._copying: deque[int] = deque()
        self._last = outgoing.steps[-1].seq if outgoing.steps else 0
        self._received = self._sent = 0
        self._copy_s = self._idle_s = 0.0

    def finished(self) -> bool:
        """Whether there is nothing left to do, here or for the readers of this ring."""
        return (
            self._filled == len(self._outgoing.steps)
            and not self._held
            and not any(self._departures)
            and all(leaving is None for leaving in self._leaving)
            and self._writer.advance() >= self._last
            and self._writer.done() >= self._last
        )

    def turn(self) -> bool:
        """Do all that can be done now. Whether that was anything."""
        moved = self._take_in()
        moved |= self._pass_on()
        moved |= self._fill()
        published = self._writer.advance()
        while self._copying and self._copying[0] <= published:
            self._release(self._copying.popleft())
            moved = True
        return moved

    def idle(self) -> None:
        """Wait a moment for a socket; ranks that read are looked at in between."""
        start = time.perf_counter()
        reads = [inlet for inlet in self._inlets if inlet.busy]
        writes = [outlet for outlet in self._outlets if not outlet.idle]
        if reads or writes:
            select.select(reads, writes, [], _NAP_S)
        else:
            time.sleep(_NAP_S)
        self._idle_s += time.perf_counter() - start

    def waits_for(self) -> str:
        """In words, for a deadline."""
        missing = [self._inlets[number].peer for number, seqs in enumerate(self._expected) if seqs]
        behind = [outlet.peer for outlet, leaving in zip(self._outlets, self._leaving, strict=True) if leaving]
        return f"buckets from agents {missing}, agents {behind} to take theirs, or ranks of this host to read bucket {self._filled}"

    def stats(self, total_s: float) -> AgentStats:
        """What it did."""
        return AgentStats(
            sent_bytes=sum(self._sizes.values()),
            copy_s=self._copy_s,
            wait_s=self._idle_s,
            total_s=total_s,
            network_in_bytes=self._received,
            network_out_bytes=self._sent,
        )

    def _take_in(self) -> bool:
        arrivals = self._relay.arrivals
        while self._granted < len(arrivals) and self._slots.free:
            arrival = arrivals[self._granted]
            held = _Arrived(self._slots.free.pop(), self._sizes[arrival.seq], self._uses[arrival.seq])
            self._held[arrival.seq] = held
            self._expected[arrival.inlet].append(arrival.seq)
            self._granted += 1
        moved = False
        for inlet, expected in zip(self._inlets, self._expected, strict=True):
            while expected:
                held = self._held[expected[0]]
                if not inlet.busy:
                    inlet.expect(held.bytes.data, expected[0])
                some, digest = inlet.pump()
                moved |= some
                if digest is None:
                    break
                held.digest = digest
                self._received += held.bytes.size
                expected.popleft()
        return moved

    def _pass_on(self) -> bool:
        moved = False
        for number, outlet in enumerate(self._outlets):
            moved |= outlet.pump()
            if not outlet.idle:
                continue
            if (left := self._leaving[number]) is not None:
                self._leaving[number] = None
                if left.seq != FROM_POOL:
                    self._release(left.seq)
                moved = True
            if self._departures[number] and self._start(number, self._departures[number][0]):
                self._leaving[number] = self._departures[number].popleft()
                outlet.pump()
                moved = True
        return moved

    def _start(self, number: int, departure: Departure) -> bool:
        """Whether the bucket is there."""
        outlet = self._outlets[number]
        if departure.bucket is not None:
            packed = self._pack(departure.bucket, self._packs[number])
            outlet.start(packed.data, xxhash.xxh3_64_intdigest(packed.data), departure.to_seq)
            self._sent += packed.size
            return True
        held = self._held.get(departure.seq)
        if held is None or held.digest is None:
            return False
        outlet.start(held.bytes.data, held.digest, departure.to_seq)
        self._sent += held.bytes.size
        return True

    def _pack(self, bucket: Bucket, room: HostBytes) -> HostBytes:
        """A bucket from the pool, row-major. What is between its pieces is nobody's."""
        packed = room[: bucket.size_bytes]
        for offset, part in self._pool.parts(self._manifest, bucket):
            source = part if isinstance(part, np.ndarray) else self._pool.read(part)
            packed[offset : offset + source.size].reshape(source.shape)[...] = source
        return packed

    def _fill(self) -> bool:
        moved = False
        steps = self._outgoing.steps
        while self._filled < len(steps):
            step = steps[self._filled]
            held = self._held.get(step.seq)
            if (step.seq in self._uses and (held is None or held.digest is None)) or (
                self._writer.done() < step.free_after_seq
            ):
                break
            start = time.perf_counter()
            self._writer.fill(step, self._outgoing.parts(step) if held is None else [(0, held.bytes)])
            ended = time.perf_counter()
            self._spans.add(SpanStage.FILL, step.index, start, ended, step.bucket.size_bytes)
            self._copy_s += ended - start
            if held is not None:
                self._copying.append(step.seq)
            self._filled += 1
            moved = True
        return moved

    def _release(self, seq: int) -> None:
        held = self._held[seq]
        held.uses -= 1
        if not held.uses:
            self._slots.free.append(self._held.pop(seq).slot)


def _room(departures: Iterable[Departure]) -> HostBytes:
    """For the largest bucket that goes out from the pool: new pages for each would cost more than the copy."""
    sizes = [departure.bucket.size_bytes for departure in departures if departure.bucket is not None]
    return np.zeros(max(sizes, default=0), dtype=np.uint8)
