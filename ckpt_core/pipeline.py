"""The two loops that move a plan: an agent fills its ring, a rank empties all rings. Overlapped, because neither waits
for the other beyond the sequence numbers of a ring that holds several buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ckpt_core.manifest import Manifest
from ckpt_core.plan import Plan, Step
from ckpt_core.polling import Poller
from ckpt_core.staging import HostPool
from ckpt_core.transport.base import RingReader, RingWriter
from ckpt_core.wire import AgentStats

Consume = Callable[[Step, RingReader], None]


def send(
    plan: Plan, owner: int, *, pool: HostPool, manifest: Manifest, writer: RingWriter, poller: Poller
) -> AgentStats:
    """Copy every bucket of one owner into its ring, each as soon as what it overwrites has been read.

    Returns when all receivers are done with the last one.
    """
    steps = [step for step in plan.steps if step.owner == owner]
    start = time.perf_counter()
    copy_s = 0.0
    for step in steps:
        poller.until(
            lambda after=step.free_after_seq: _advance(writer) and writer.done() >= after,  # type: ignore[misc]
            f"room in the ring of agent {owner} for bucket {step.index}",
        )
        began = time.perf_counter()
        writer.fill(step, pool.parts(manifest, step.bucket))
        copy_s += time.perf_counter() - began
        writer.advance()
        poller.check_now_and_then(f"bucket {step.index} of agent {owner}")
    last = steps[-1].seq if steps else 0
    poller.until(
        lambda: writer.advance() >= last and writer.done() >= last, f"the ranks to read agent {owner}'s last bucket"
    )
    return AgentStats(
        sent_bytes=sum(step.bucket.size_bytes for step in steps),
        copy_s=copy_s,
        wait_s=poller.waited_s,
        total_s=time.perf_counter() - start,
    )


def _advance(writer: RingWriter) -> bool:
    writer.advance()
    return True


def receive(plan: Plan, receiver: int, *, readers: Sequence[RingReader], consume: Consume, poller: Poller) -> None:
    """Take the buckets of all owners in the plan's order; `consume` those meant for this receiver, pass over the others."""
    for step in plan.steps:
        reader = readers[step.owner]
        if receiver in step.receivers:
            poller.until(
                lambda reader=reader, seq=step.seq: reader.published() >= seq,  # type: ignore[misc]
                f"bucket {step.index} from agent {step.owner}",
            )
            consume(step, reader)
        reader.release(step.seq)
        poller.check_now_and_then(f"bucket {step.index}")
    poller.until(lambda: all(reader.drained() for reader in readers), "this rank's device to be done with the rings")
