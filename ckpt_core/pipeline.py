"""The two loops that move a plan: an agent fills its ring, a rank empties all rings. Overlapped, because neither waits
for the other beyond the sequence numbers of a ring that holds several buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ckpt_core.device import DevicePart, HostBytes
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, Step
from ckpt_core.polling import Poller
from ckpt_core.staging import HostPool
from ckpt_core.stats import AgentStats
from ckpt_core.trace import SpanRecorder, SpanStage, Unrecorded
from ckpt_core.transport.base import RingReader, RingWriter

Consume = Callable[[Step], None]


class Outgoing:
    """What one agent sends: its steps, and where their bytes are, looked up once for all updates by that plan.

    Args:
        is_source: which steps' bytes come from this host's pool; those of the others arrive by a collective.

    Attributes:
        owner: the agent.
        steps: in order of seq.
    """

    def __init__(
        self,
        plan: Plan,
        owner: int,
        pool: HostPool,
        manifest: Manifest,
        *,
        is_source: Callable[[Step], bool] = lambda _step: True,
    ) -> None:
        self.owner = owner
        self.steps = tuple(step for step in plan.steps if step.owner == owner)
        self._plan = plan
        self._pool = pool
        self._layout_of_pool = pool.layout
        self._manifest = manifest
        self._is_source = is_source
        self._parts: dict[int, list[tuple[int, HostBytes | DevicePart]]] = {}

    def parts(self, step: Step) -> list[tuple[int, HostBytes | DevicePart]]:
        """Offset in the step's bucket, and bytes in the pool."""
        if (parts := self._parts.get(step.index)) is None:
            parts = self._pool.parts(self._manifest, step.bucket) if self._is_source(step) else []
            self._parts[step.index] = parts
        return parts

    def holds(self, plan: Plan) -> bool:
        """Whether it is still what this plan and the pool say."""
        return self._plan is plan and self._layout_of_pool is self._pool.layout


def send(outgoing: Outgoing, *, writer: RingWriter, poller: Poller, spans: SpanRecorder | None = None) -> AgentStats:
    """Copy every bucket of one owner into its ring, each as soon as what it overwrites has been read.

    Returns when all receivers are done with the last one. With `spans`, what the host did is recorded there.
    """
    return _send(outgoing, writer, poller, spans or Unrecorded())


def _send(outgoing: Outgoing, writer: RingWriter, poller: Poller, spans: SpanRecorder) -> AgentStats:
    start = time.perf_counter()
    copy_s = 0.0
    who = f"agent {outgoing.owner}"
    for step in outgoing.steps:
        parts = outgoing.parts(step)
        asked = time.perf_counter()
        poller.until(
            lambda after=step.free_after_seq: _advance(writer) and writer.done() >= after,  # type: ignore[misc]
            f"room in the ring of {who} for bucket {step.index}",
        )
        began = time.perf_counter()
        writer.fill(step, parts)
        ended = time.perf_counter()
        copy_s += ended - began
        spans.add(SpanStage.WAIT_ROOM, step.index, asked, began)
        spans.add(SpanStage.FILL, step.index, began, ended, step.bucket.size_bytes)
        writer.advance()
        poller.check_now_and_then(f"bucket {step.index} of {who}")
    last = outgoing.steps[-1].seq if outgoing.steps else 0
    with spans.timed(SpanStage.WAIT_READ):
        poller.until(
            lambda: writer.advance() >= last and writer.done() >= last, f"the ranks to read {who}'s last bucket"
        )
    return AgentStats(
        sent_bytes=sum(step.bucket.size_bytes for step in outgoing.steps),
        copy_s=copy_s,
        wait_s=poller.waited_s,
        total_s=time.perf_counter() - start,
    )


def _advance(writer: RingWriter) -> bool:
    writer.advance()
    return True


def _drain(readers: Sequence[RingReader]) -> bool:
    """Let every owner know what this rank's device is done with, also while it waits for another one."""
    for reader in readers:
        reader.drained()
    return True


def receive(
    plan: Plan,
    receiver: int,
    *,
    readers: Sequence[RingReader],
    consume: Consume,
    poller: Poller,
    spans: SpanRecorder | None = None,
    expect: Consume = lambda _step: None,
) -> None:
    """Take the buckets of all owners in the plan's order; `consume` those meant for this receiver, pass over the others.

    `expect` is told of each before its bytes are waited for.
    """
    _receive(plan, receiver, readers, expect, consume, poller, spans or Unrecorded())


def _receive(  # noqa: PLR0917
    plan: Plan,
    receiver: int,
    readers: Sequence[RingReader],
    expect: Consume,
    consume: Consume,
    poller: Poller,
    spans: SpanRecorder,
) -> None:
    for step in plan.steps:
        reader = readers[step.owner]
        if receiver in step.receivers:
            expect(step)
            asked = time.perf_counter()
            poller.until(
                lambda reader=reader, seq=step.seq: _drain(readers) and reader.published() >= seq,  # type: ignore[misc]
                f"bucket {step.index} from agent {step.owner}",
            )
            spans.add(SpanStage.WAIT_BYTES, step.index, asked, time.perf_counter())
            consume(step)
        reader.release(step.seq)
        poller.check_now_and_then(f"bucket {step.index}")
    with spans.timed(SpanStage.WAIT_DRAIN):
        poller.until(
            lambda: all(reader.drained() for reader in readers), "this rank's device to be done with the rings"
        )
