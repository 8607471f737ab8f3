"""The ring of an agent and its sequence numbers, in shared memory: what is published, freed, refused and given back."""

import stat

import numpy as np
import pytest

from ckpt_core.bucket import Bucket, Piece
from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import CapacityError, ConfigError, TransportError
from ckpt_core.plan import Step
from ckpt_core.shm import SharedFile
from ckpt_core.transport import ipc
from ckpt_core.transport.ipc import IpcRingReader, IpcRingWriter, SequenceBlock
from ckpt_core.wire import RingOffer


def step(seq, *, offset=0, size=256):
    piece = Piece(tensor=0, box=None, offset_bytes=0, size_bytes=size)
    bucket = Bucket(index=seq - 1, size_bytes=size, pieces=(piece,))
    return Step(
        index=seq - 1, bucket=bucket, owner=0, seq=seq, ring_offset_bytes=offset, free_after_seq=0, receivers=(0,)
    )


def data(value, size=256):
    return [(0, np.full(size, value, dtype=np.uint8))]


@pytest.fixture
def writer(tmp_path):
    made = IpcRingWriter(owner=0, receivers=2, ring_bytes=1024, device=CpuDevice(), directory=tmp_path)
    yield made
    made.close()


@pytest.fixture
def readers(writer):
    made = [IpcRingReader(writer.offer(), receiver=number, receivers=2, device_index=0) for number in range(2)]
    yield made
    for reader in made:
        reader.close()


# -- sequence numbers --------------------------------------------------------------------------------------------
def test_numbers_are_seen_by_the_other_side(tmp_path):
    mine = SequenceBlock.create(tmp_path / "control", 3)
    other = SequenceBlock.open(tmp_path / "control", 3)
    assert (other.published, mine.done()) == (0, 0)
    mine.published = 2**62
    assert other.published == 2**62
    for receiver, seq in enumerate((5, 2**40, 7)):
        other.set_done(receiver, seq)
    assert mine.done() == 5
    other.set_done(0, 8)
    assert mine.done() == 7
    other.close()
    mine.close()


def test_each_number_has_a_cache_line_of_its_own(tmp_path):
    block = SequenceBlock.create(tmp_path / "control", 2)
    block.published = -1
    block.set_done(0, -1)
    block.set_done(1, -1)
    raw = np.frombuffer((tmp_path / "control").read_bytes(), dtype=np.uint8).reshape(-1, 64)
    assert [int(line[:8].all()) for line in raw] == [1, 1, 1, 1]
    assert not raw[:, 8:].any()
    block.close()


def test_the_block_is_private_and_goes_with_its_owner(tmp_path):
    block = SequenceBlock.create(tmp_path / "control", 1)
    assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600
    other = SequenceBlock.open(tmp_path / "control", 1)
    other.close()
    other.close()
    assert (tmp_path / "control").exists()
    block.close()
    block.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_the_mark_is_no_block(tmp_path):
    (tmp_path / "control").write_bytes(bytes(64 * 3))
    with pytest.raises(TransportError, match="does not hold the sequence numbers"):
        SequenceBlock.open(tmp_path / "control", 1)


def test_a_block_for_fewer_receivers_is_refused(tmp_path):
    block = SequenceBlock.create(tmp_path / "control", 1)
    with pytest.raises(TransportError, match="at least 320 bytes"):
        SequenceBlock.open(tmp_path / "control", 3)
    block.close()


def test_a_block_that_is_not_there_is_a_typed_error(tmp_path):
    with pytest.raises(TransportError, match="cannot open"):
        SequenceBlock.open(tmp_path / "control", 3)


# -- rings -------------------------------------------------------------------------------------------------------
def test_files_of_a_ring_are_private(writer, tmp_path):
    assert writer.offer().size_bytes == 1024
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 2


def test_bytes_come_through_and_are_published_by_advance_only(writer, readers):
    writer.fill(step(1, offset=256), data(7))
    assert [reader.published() for reader in readers] == [0, 0]
    assert writer.advance() == 1
    for reader in readers:
        assert reader.published() == 1
        assert bytes(reader.view(256, 256).numpy()) == b"\x07" * 256
        assert not reader.view(0, 256).any()
        assert not reader.view(512, 512).any()


def test_parts_go_to_their_offsets(writer, readers):
    writer.fill(step(1, offset=256, size=512), [(0, np.full(3, 1, np.uint8)), (256, np.full(5, 2, np.uint8))])
    writer.advance()
    got = readers[0].view(256, 512).numpy()
    assert list(got[:4]) == [1, 1, 1, 0]
    assert list(got[256:262]) == [2, 2, 2, 2, 2, 0]


def test_a_view_is_the_ring_itself(writer, readers):
    view = readers[0].view(0, 4)
    writer.fill(step(1), data(9))
    assert list(view.numpy()) == [9, 9, 9, 9]
    del view


def test_done_is_that_of_the_slowest(writer, readers):
    assert writer.done() == 0
    readers[0].release(3)
    assert writer.done() == 0
    readers[1].release(2)
    assert writer.done() == 2
    assert all(reader.drained() for reader in readers)


class LateBuffer:
    """Copies that complete when the test says so."""

    handle, size_bytes = "late", 1024

    def __init__(self):
        self.complete = 0
        self.marked = 0

    def write(self, offset_bytes, source):
        """Nothing to see."""

    def mark(self):
        self.marked += 1
        number = self.marked
        return type("Mark", (), {"reached": lambda _self: number <= self.complete})()

    def view(self, offset_bytes, size_bytes):
        raise NotImplementedError

    def close(self):
        """Nothing to give back."""


class LateDevice(CpuDevice):
    def __init__(self):
        self.buffer = LateBuffer()

    def allocate(self, size_bytes, directory, label):
        return self.buffer

    def map(self, handle, size_bytes, device_index):
        return self.buffer


def test_nothing_is_published_before_its_copy_is_complete(tmp_path):
    device = LateDevice()
    writer = IpcRingWriter(owner=0, receivers=1, ring_bytes=1024, device=device, directory=tmp_path)
    for seq in (1, 2, 3):
        writer.fill(step(seq), data(1))
    assert writer.advance() == 0
    device.buffer.complete = 2
    assert writer.advance() == 2
    device.buffer.complete = 3
    assert writer.advance() == 3
    writer.close()


def test_nothing_is_freed_before_the_ranks_device_is_done(tmp_path, monkeypatch):
    device = LateDevice()
    writer = IpcRingWriter(owner=0, receivers=1, ring_bytes=1024, device=device, directory=tmp_path)
    monkeypatch.setattr(ipc, "device_of", lambda _name: device)
    reader = IpcRingReader(writer.offer(), receiver=0, receivers=1, device_index=0)
    reader.release(1)
    reader.release(2)
    assert (reader.drained(), writer.done()) == (False, 0)
    device.buffer.complete = 1
    assert (reader.drained(), writer.done()) == (False, 1)
    device.buffer.complete = 2
    assert (reader.drained(), writer.done()) == (True, 2)
    reader.close()
    writer.close()


def test_an_unknown_device_is_refused_and_leaves_nothing_mapped(writer):
    offer = writer.offer()
    bad = RingOffer(owner=0, device="tpu", handle=offer.handle, size_bytes=1024, control_path=offer.control_path)
    with pytest.raises(ConfigError, match="no device 'tpu'"):
        IpcRingReader(bad, receiver=0, receivers=2, device_index=0)
    with open("/proc/self/maps") as maps:
        assert sum(offer.control_path in line for line in maps) == 1


def test_a_ring_shorter_than_offered_is_refused(writer):
    offer = writer.offer()
    bad = RingOffer(owner=0, device="cpu", handle=offer.handle, size_bytes=4096, control_path=offer.control_path)
    with pytest.raises(TransportError, match="at least 4096 bytes"):
        IpcRingReader(bad, receiver=0, receivers=2, device_index=0)


def test_close_removes_both_files_twice_over(writer, readers, tmp_path):
    for _ in range(2):
        writer.close()
        for reader in readers:
            reader.close()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_outlives_the_writer(writer, readers):
    """A dead owner blocks nobody: what is mapped stays readable."""
    writer.fill(step(1), data(5))
    writer.advance()
    writer.close()
    assert readers[0].published() == 1
    assert list(readers[0].view(0, 2).numpy()) == [5, 5]
    readers[0].release(1)
    assert readers[0].drained()


def test_a_view_that_an_engine_kept_does_not_break_close(writer, readers):
    kept = readers[0].view(0, 16)
    readers[0].close()
    writer.close()
    assert kept.numel() == 16
    assert not kept.any()


def test_when_there_is_no_room_for_the_numbers_the_ring_is_given_back(tmp_path, monkeypatch):
    create = SharedFile.create

    def full(path, size_bytes):
        if path.name.startswith("control"):
            raise CapacityError("no room")
        return create(path, size_bytes)

    monkeypatch.setattr(SharedFile, "create", full)
    with pytest.raises(CapacityError):
        IpcRingWriter(owner=0, receivers=1, ring_bytes=1024, device=CpuDevice(), directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
