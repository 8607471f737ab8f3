"""Between hosts: every bucket enters one host's ring from its pool, and all other hosts' rings by broadcast.

Each host has one agent per lane. The plan's owner is the lane; its buckets come from the hosts in turn. Copies of later batches,
the broadcast of one, and the ranks' use of earlier ones overlap: copies run on the ring's stream, broadcasts on the backend's
own, ranks in their processes. Ranks see an ordinary ring.

Order and room: all hosts start the batches of a lane in the same order, which follows the plan alone. A host takes part in a batch
when its ranks are done with what the batch overwrites and, where it is the source, its own copies are complete, both seen by
polling. It says so to the other hosts, and starts what all are ready for (why: see `peers`). No device waits for another process.

Small buckets: a broadcast costs a launch on every host and a note between all. Consecutive buckets are therefore cut into batches
of up to 16 MiB, the source is chosen per batch where it is free to choose, and buckets of a batch that are adjacent in the ring
and of one source travel as one broadcast. What cannot be joined (sources given from outside, the end of the ring) is started as
one group where the backend can (NCCL). Measured with gloo on two cores: buckets of 128 KiB go 2.3 times as fast joined as alone or
with sources that change with each, those of 1 MiB and more the same. `benchmarks/collective.py` measures it on GPUs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash

from ckpt_core.assign import assign_owners
from ckpt_core.cpu import CpuBuffer
from ckpt_core.cuda.device import CudaBuffer
from ckpt_core.cuda.dlpack import DeviceBytes
from ckpt_core.device import Buffer, Device, DevicePart, HostBytes, Mark
from ckpt_core.errors import ConfigError, PeerLost, TransportError
from ckpt_core.plan import Step
from ckpt_core.transport.groups import CollectiveGroup
from ckpt_core.transport.ipc import IpcRingWriter

_LARGEST_BATCH_BYTES = 16 << 20  # at 100 GB/s some 160 us, ten times what it costs to start it
_CHECK_EVERY_S = 5e-3

Sources = Callable[[Step], int] | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Adjacent bytes of the ring that come from one host: one broadcast."""

    source: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Broadcasts that start together. `last_seq` is the last bucket of the lane that is there when they are complete."""

    last_seq: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What a lane broadcasts, in which order: the same on all hosts.

    Attributes:
        sources: host that each bucket comes from; bucket of seq s at s - 1.
        batches: in order.
        digest: of all of it, 64 bits.
    """

    sources: tuple[int, ...]
    batches: tuple[Batch, ...]
    digest: int

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        *,
        hosts: int,
        ring_bytes: int,
        sources: Sources | None = None,
        batch_bytes: int | None = None,
    ) -> Schedule:
        """The schedule of the steps of one lane.

        Args:
            steps: all steps of one owner, in order of seq.
            hosts: number of hosts.
            ring_bytes: of the plan.
            sources: host of each step; None deals batches so that bytes are even at every point.
            batch_bytes: size of a batch; a bucket that is larger is one by itself. None: see `default_batch_bytes`.

        Raises:
            ConfigError: a source that is no host, or not one for each step.
        """
        assert [step.seq for step in steps] == list(range(1, len(steps) + 1)), "steps of one owner, in order of seq"
        limit = default_batch_bytes(ring_bytes, hosts) if batch_bytes is None else batch_bytes
        cut = list(_cut(steps, limit))
        chosen = _deal(cut, hosts) if sources is None else _given(steps, sources, hosts)
        batches = tuple(Batch(last_seq=batch[-1].seq, regions=tuple(_regions(batch, chosen))) for batch in cut)
        digest = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode((hosts, chosen, batches)))
        return cls(sources=chosen, batches=batches, digest=digest)

    def is_from(self, host: int, step: Step) -> bool:
        """Whether that host's agent copies the step's bucket out of its pool; the others need no bytes for it."""
        return self.sources[step.seq - 1] == host


def default_batch_bytes(ring_bytes: int, hosts: int) -> int:
    """Room in the ring for each host to copy one batch while one of each is broadcast, and two that the ranks are reading."""
    return min(_LARGEST_BATCH_BYTES, ring_bytes // (2 * hosts + 2))


def _cut(steps: Sequence[Step], limit: int) -> Iterator[list[Step]]:
    """Cut by size; and before a bucket that waits for room which one of its own batch has to make: that would wait for ever."""
    batch: list[Step] = []
    size = 0
    for step in steps:
        if batch and (size + step.bucket.size_bytes > limit or step.free_after_seq >= batch[0].seq):
            yield batch
            batch, size = [], 0
        batch.append(step)
        size += step.bucket.size_bytes
    if batch:
        yield batch


def _deal(cut: Sequence[Sequence[Step]], hosts: int) -> tuple[int, ...]:
    dealt = assign_owners([sum(step.bucket.size_bytes for step in batch) for batch in cut], hosts)
    return tuple(host for batch, host in zip(cut, dealt, strict=True) for _ in batch)


def _given(steps: Sequence[Step], sources: Sources, hosts: int) -> tuple[int, ...]:
    chosen = tuple(sources(step) for step in steps) if callable(sources) else tuple(sources)
    if len(chosen) != len(steps) or not all(0 <= host < hosts for host in chosen):
        raise ConfigError(
            f"sources: expected {len(steps)} hosts from 0 to {hosts - 1}, got {len(chosen)}: {chosen!s:.200}; give each bucket one"
        )
    return chosen


def _regions(batch: Sequence[Step], sources: Sequence[int]) -> Iterator[Region]:
    source = begin = end = -1
    for step in batch:
        if not step.bucket.size_bytes:
            continue
        if (sources[step.seq - 1], step.ring_offset_bytes) != (source, end):
            if end > begin:
                yield Region(source=source, offset_bytes=begin, size_bytes=end - begin)
            source, begin = sources[step.seq - 1], step.ring_offset_bytes
        end = step.ring_offset_bytes + step.bucket.size_bytes
    if end > begin:
        yield Region(source=source, offset_bytes=begin, size_bytes=end - begin)


class CollectiveRingWriter(IpcRingWriter):
    """One host's agent of a lane. See `transport.base.RingWriter`; `pipeline.send` drives it on every host alike.

    Args:
        group: the lane's, idle; kept by the caller, for the next update too, unless it is broken after `close`.
        schedule: the same on all hosts.
        timeout_s: longest time without progress while other hosts are waited for.
        wait_for_peers: start a batch only when all hosts are ready for it. False only to measure what that is worth.
    """

    def __init__(
        self,
        *,
        owner: int,
        receivers: int,
        ring_bytes: int,
        device: Device,
        directory: Path,
        group: CollectiveGroup,
        schedule: Schedule,
        timeout_s: float,
        wait_for_peers: bool = True,
    ) -> None:
        group.begin(schedule.digest)
        super().__init__(owner=owner, receivers=receivers, ring_bytes=ring_bytes, device=device, directory=directory)
        self._group = group
        self._schedule = schedule
        self._timeout_s = timeout_s
        self._wait_for_peers = wait_for_peers
        try:
            self._owner_of_bytes, self._ring = _ring_tensor(self._buffer, group.device)
        except BaseException:
            super().close()
            raise
        self._filled = self._ready = self._started = self._complete = 0  # batches, in the order in which they get there
        self._copying: deque[Mark] = deque()
        self._broadcasting: deque[Mark] = deque()
        self._checked_s = self._progress_s = time.monotonic()

    def fill(self, step: Step, parts: list[tuple[int, HostBytes | DevicePart]]) -> None:
        """Start the copies of one bucket, where it comes from this host; else `parts` may be empty and are not looked at."""
        if self._schedule.is_from(self._group.me.host, step):
            for offset, source in parts:
                self._buffer.write(step.ring_offset_bytes + offset, source)
        if step.seq == self._schedule.batches[self._filled].last_seq:
            self._copying.append(self._buffer.mark())
            self._filled += 1

    def advance(self) -> int:
        """Move every batch on as far as it can go, and publish those that have arrived.

        Raises:
            PeerLost: another host is gone, or made no progress for too long; the group is broken then.
            TransportError: the hosts follow different schedules.
        """
        if self._complete < self._filled:
            try:
                self._announce()
                self._start()
                self._publish()
                self._watch()
            except TransportError:
                self._group.abort()
                raise
        return self._sequence.published

    def done(self) -> int:
        """The slowest receiver, and the broadcasts: a rank passes over a bucket that it does not need before it has arrived."""
        return min(self._sequence.done(), self._sequence.published)

    def close(self) -> None:
        """Give ring and numbers back. With batches on their way the group breaks: the other hosts' halves would not match."""
        if self._ready > self._complete:
            self._group.abort()
        elif self._ready:
            self._group.end()
        self._filled = self._ready = self._started = self._complete = 0
        self._copying.clear()
        self._broadcasting.clear()
        self._ring = torch.empty(0, dtype=torch.uint8)
        super().close()

    def _announce(self) -> None:
        before = self._ready
        while self._copying and self._copying[0].reached():
            self._copying.popleft()
            self._ready += 1
        if self._ready > before:
            if before == self._complete:
                self._progress_s = time.monotonic()  # nobody was waited for until now
            self._group.tell(self._ready)

    def _start(self) -> None:
        if self._started == self._ready:
            return
        agreed = self._group.agreed(self._ready) if self._wait_for_peers else self._ready
        while self._started < agreed:
            regions = self._schedule.batches[self._started].regions
            views = [
                (self._ring[part.offset_bytes : part.offset_bytes + part.size_bytes], part.source) for part in regions
            ]
            self._broadcasting.append(self._group.broadcast(views))
            self._started += 1
            self._progress_s = time.monotonic()

    def _publish(self) -> None:
        while self._broadcasting and self._broadcasting[0].reached():
            self._broadcasting.popleft()
            self._sequence.published = self._schedule.batches[self._complete].last_seq
            self._complete += 1
            self._progress_s = time.monotonic()

    def _watch(self) -> None:
        """Deaths and standstill, looked for now and then."""
        now = time.monotonic()
        if now - self._checked_s < _CHECK_EVERY_S:
            return
        self._checked_s = now
        if self._complete == self._ready:
            return
        self._group.check()
        if now - self._progress_s > self._timeout_s:
            raise PeerLost(
                f"lane {self._group.me.lane}: {self._standstill()} for {self._timeout_s:g} s; see the logs of those agents and of "
                "their ranks, and join the lane anew"
            )

    def _standstill(self) -> str:
        number, total = self._complete + 1, len(self._schedule.batches)
        if self._started > self._complete:
            return f"broadcast {number} of {total} was started and did not complete"
        return f"hosts {self._group.behind(number)} were not ready for broadcast {number} of {total}"


def _ring_tensor(buffer: Buffer, device: torch.device) -> tuple[object, torch.Tensor]:
    """All bytes of a ring in its owner's process as uint8, and what must outlive that tensor."""
    if isinstance(buffer, CpuBuffer):
        return None, torch.from_numpy(buffer._file.array)
    if isinstance(buffer, CudaBuffer):
        raw = DeviceBytes(buffer._pointer, buffer.size_bytes, device.index)
        return raw, raw.tensor()
    raise ConfigError(f"rings of {type(buffer).__name__} cannot be broadcast; known: main memory and CUDA")
