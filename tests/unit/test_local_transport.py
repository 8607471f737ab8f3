"""The ring within one process, whose faults the tests above it are made of: each must do just what it says."""

import threading

import numpy as np
import pytest

from ckpt_core.bucket import Bucket
from ckpt_core.errors import PeerLost
from ckpt_core.plan import Step
from ckpt_core.transport.local import Faults, LocalRing, LocalRingReader, LocalRingWriter


def step(seq, offset=0):
    bucket = Bucket(index=seq - 1, size_bytes=8, pieces=())
    return Step(
        index=seq - 1, bucket=bucket, owner=0, seq=seq, ring_offset_bytes=offset, free_after_seq=0, receivers=(0, 1)
    )


def eight(value):
    return [(0, np.full(8, value, dtype=np.uint8))]


def pair(faults=None, receivers=1):
    ring = LocalRing(owner=0, receivers=receivers, ring_bytes=32)
    return LocalRingWriter(ring, faults), [LocalRingReader(ring, receiver=number) for number in range(receivers)]


def content(reader, offset=0):
    return list(reader.view(offset, 8).numpy())


def test_without_faults_bytes_are_there_when_published():
    writer, (reader,) = pair()
    writer.fill(step(1, offset=16), eight(3))
    assert reader.published() == 0
    assert writer.advance() == 1 == reader.published()
    assert content(reader, 16) == [3] * 8
    assert content(reader) == [0] * 8


def test_done_is_that_of_the_slowest_receiver():
    writer, readers = pair(receivers=2)
    readers[0].release(4)
    assert writer.done() == 0
    readers[1].release(2)
    assert writer.done() == 2
    assert readers[0].drained()


def test_a_held_bucket_holds_back_those_behind_it():
    gate = threading.Event()
    writer, (reader,) = pair(Faults(hold={2: gate}))
    for seq in (1, 2, 3):
        writer.fill(step(seq, offset=8 * seq), eight(seq))
    assert writer.advance() == 1
    gate.set()
    assert writer.advance() == 3 == reader.published()


def test_a_flip_inverts_one_byte():
    writer, (reader,) = pair(Faults(flip={1: 5}))
    writer.fill(step(1), eight(1))
    assert content(reader) == [1, 1, 1, 1, 1, 254, 1, 1]


def test_a_drop_publishes_what_lay_there_before():
    writer, (reader,) = pair(Faults(drop=frozenset({2})))
    for seq in (1, 2):
        writer.fill(step(seq), eight(seq))
    assert writer.advance() == 2
    assert content(reader) == [1] * 8


def test_early_publication_comes_before_the_bytes():
    writer, (reader,) = pair(Faults(early=frozenset({1})))
    writer.fill(step(1), eight(1))
    assert writer.advance() == 1
    assert content(reader) == [0] * 8
    writer.fill(step(2, offset=8), eight(2))
    assert content(reader) == [1] * 8


def test_a_lost_writer_publishes_nothing_from_there_on():
    writer, (reader,) = pair(Faults(lose_at=2))
    writer.fill(step(1), eight(1))
    assert writer.advance() == 1
    with pytest.raises(PeerLost, match="fail at bucket 2"):
        writer.fill(step(2), eight(2))
    with pytest.raises(PeerLost):
        writer.advance()
    assert reader.published() == 1


def test_the_offer_tells_the_size_and_closing_is_idempotent():
    writer, (reader,) = pair()
    assert writer.offer().size_bytes == 32
    for _ in range(2):
        writer.close()
        reader.close()
