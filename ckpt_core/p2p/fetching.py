"""The loop of an agent whose bytes are in other hosts' memory: read ahead, prove, copy into the ring, while ranks pull from it.

The leaves of a bucket are read into a slot of host memory that was registered once, from as many owners as there are, and compared
with the digests of the version. What is damaged is read again from another owner, and so is what was asked of one that is gone. One
that neither delivers nor fails (stopped, cut off) is given up; the slot is not used again, because its bytes may still come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from ckpt_core.device import HostBytes
from ckpt_core.errors import PeerLost, TransferTimeout
from ckpt_core.p2p.covers import Cover
from ckpt_core.p2p.incoming_bucket import Chunk, IncomingBucket, Leaves
from ckpt_core.p2p.owners import Owners
from ckpt_core.p2p.rate import TokenBucket
from ckpt_core.plan import Step
from ckpt_core.polling import Poller
from ckpt_core.stats import AgentStats
from ckpt_core.trace import SpanRecorder, SpanStage, Unrecorded
from ckpt_core.transport.base import RingWriter

_NAP_S = 100e-6


class Fetch:
    """One agent's part in one update.

    Args:
        leaves: of the version.
        steps: of this agent, in order of seq.
        covers: of each of them; see covers_of.
        slots: registered memory, each for the leaves of any bucket.
        spare: makes one more.
        limit: of what this agent reads; None for none.
        stalled_s: an owner that delivers nothing for so long is given up.
    """

    def __init__(
        self,
        leaves: Leaves,
        steps: Sequence[Step],
        covers: Sequence[tuple[Cover, ...]],
        *,
        owners: Owners,
        slots: Sequence[HostBytes],
        spare: Callable[[], HostBytes],
        writer: RingWriter,
        limit: TokenBucket | None = None,
        spans: SpanRecorder | None = None,
        stalled_s: float = 10.0,
    ) -> None:
        self._leaves, self._steps, self._covers, self._owners = leaves, steps, covers, owners
        self._free, self._spare = list(slots), spare
        self._writer, self._limit, self._spans = writer, limit, spans or Unrecorded()
        self._stalled_s = stalled_s
        self._begun = self._filled = 0
        self._buckets: deque[IncomingBucket] = deque()  # begun and not filled, in order
        self._copying: deque[IncomingBucket] = deque()
        self._todo: deque[Chunk] = deque()
        self._on_way: list[Chunk] = []
        self._landed: deque[Chunk] = deque()  # and not proved
        self._stray: list[Chunk] = []  # given up: they may still land
        self._granted: Chunk | None = None  # by the limit, for when it may be asked for
        self._not_before = 0.0
        self._copy_s = self._idle_s = 0.0

    def run(self, poller: Poller) -> AgentStats:
        """All of it; returns when the ranks have read the last bucket.

        Raises:
            PeerLost: no owner is left that gives the right bytes.
        """
        start = time.perf_counter()
        last = self._steps[-1].seq if self._steps else 0
        while self._filled < len(self._steps) or self._writer.advance() < last or self._writer.done() < last:
            if not self._turn():
                time.sleep(_NAP_S)
                self._idle_s += _NAP_S
            poller.check_now_and_then(f"bytes from {self._owners}, or ranks to read bucket {self._filled}")
        return AgentStats(
            sent_bytes=sum(step.bucket.size_bytes for step in self._steps),
            copy_s=self._copy_s,
            wait_s=self._idle_s,
            total_s=time.perf_counter() - start,
            network_in_bytes=sum(self._owners.got_bytes.values()),
        )

    def may_still_land(self) -> bool:
        """Whether bytes that were given up may still be written into slots."""
        self._stray = [chunk for chunk in self._stray if not _ended(chunk)]
        return bool(self._stray or self._on_way)

    def _turn(self) -> bool:
        """Do all that can be done now. Whether that was anything."""
        # chunks come in bunches: the next are asked for before any is proved, and one is proved at a time
        moved = self._begin() | self._collect() | self._ask() | self._prove() | self._fill()
        published = self._writer.advance()
        while self._copying and self._copying[0].step.seq <= published:
            self._free.append(self._copying.popleft().slot)
            moved = True
        return moved

    def _begin(self) -> bool:
        begun = self._begun
        while self._begun < len(self._steps) and self._free:
            number = self._begun
            bucket = IncomingBucket(self._steps[number], self._covers[number], self._free.pop(), self._leaves)
            self._buckets.append(bucket)
            self._todo.extend(bucket.chunks())
            self._begun += 1
        return self._begun > begun

    def _ask(self) -> bool:
        asked = False
        while self._todo:
            chunk = self._todo[0]
            name = self._owners.next(chunk.wrong)
            if name is None or not self._may_ask(chunk):
                break
            self._todo.popleft()
            asked = True
            if chunk.ask(name, self._owners):
                self._on_way.append(chunk)
            else:
                self._todo.appendleft(chunk)
        return asked

    def _may_ask(self, chunk: Chunk) -> bool:
        if self._limit is not None and chunk is not self._granted:
            self._granted = chunk
            self._not_before = time.monotonic() + self._limit.take(chunk.size_bytes)
        return time.monotonic() >= self._not_before

    def _collect(self) -> bool:
        on_way, self._on_way = self._on_way, []
        moved = False
        for chunk in on_way:
            try:
                arrived = chunk.arrived()
            except PeerLost as error:
                self._owners.ended(chunk.owner, chunk.size_bytes, error)
                self._todo.appendleft(chunk)
            else:
                if not arrived:
                    self._on_way.append(chunk)
                    continue
                self._owners.ended(chunk.owner, chunk.size_bytes, None)
                self._landed.append(chunk)
            moved = True
        silent = [chunk for chunk in self._on_way if self._owners.silent_s(chunk.owner, chunk.began) > self._stalled_s]
        return self._give_up(silent) or moved

    def _prove(self) -> bool:
        if not self._landed:
            return False
        chunk = self._landed.popleft()
        if (again := chunk.bucket.take(chunk)) is not None:
            self._todo.appendleft(again)
        return True

    def _give_up(self, stalled: Sequence[Chunk]) -> bool:
        """Their owners are not asked again, and their buckets begin anew elsewhere."""
        buckets = {id(chunk.bucket): chunk.bucket for chunk in stalled}
        for chunk in [chunk for chunk in self._on_way if id(chunk.bucket) in buckets]:
            self._on_way.remove(chunk)
            self._stray.append(chunk)
            if chunk in stalled:
                error = TransferTimeout(f"no bytes within {self._stalled_s:g} s")
                self._owners.ended(chunk.owner, chunk.size_bytes, error)
            else:
                self._owners.dropped(chunk.owner, chunk.size_bytes)
        self._todo, self._landed = (
            deque(chunk for chunk in chunks if id(chunk.bucket) not in buckets) for chunks in (self._todo, self._landed)
        )
        for bucket in reversed(buckets.values()):
            fresh = IncomingBucket(bucket.step, bucket.covers, self._spare(), self._leaves)
            self._buckets[self._buckets.index(bucket)] = fresh
            self._todo.extendleft(reversed([*fresh.chunks()]))
        return bool(stalled)

    def _fill(self) -> bool:
        filled = self._filled
        while self._buckets and self._buckets[0].proved and self._writer.done() >= self._buckets[0].step.free_after_seq:
            bucket = self._buckets.popleft()
            start = time.perf_counter()
            self._writer.fill(bucket.step, bucket.parts())
            ended = time.perf_counter()
            self._spans.add(SpanStage.FILL, bucket.step.index, start, ended, bucket.step.bucket.size_bytes)
            self._copy_s += ended - start
            self._copying.append(bucket)
            self._filled += 1
        return self._filled > filled


def _ended(chunk: Chunk) -> bool:
    try:
        return chunk.arrived()
    except PeerLost:
        return True
