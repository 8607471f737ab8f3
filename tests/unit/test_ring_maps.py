"""Rings mapped in the background, taken, changed and let go of. On a CPU device."""

from pathlib import Path

import pytest

from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import TransportError
from ckpt_core.ring_maps import RingMaps
from ckpt_core.transport.ipc import IpcRingWriter
from ckpt_core.wire import RingSet


@pytest.fixture
def rings(tmp_path):
    writers = []

    def make(size_bytes):
        writer = IpcRingWriter(
            owner=0, number=len(writers), receivers=1, ring_bytes=size_bytes, device=CpuDevice(), directory=tmp_path
        )
        writers.append(writer)
        return RingSet(offers=(writer.offer(),), receiver=0, receivers=1)

    yield make
    for writer in writers:
        writer.close()


@pytest.fixture
def maps():
    made = RingMaps(device_index=0)
    yield made
    made.close()


def test_rings_begun_are_the_rings_taken(maps, rings):
    offered = rings(1024)
    maps.begin(offered)
    (reader,) = maps.take(offered)
    assert maps.take(offered)[0] is reader
    assert reader.view(0, 1024).numel() == 1024


def test_rings_need_not_be_begun(maps, rings):
    (reader,) = maps.take(rings(1024))
    assert reader.published() == 0


def test_others_take_their_place(maps, rings):
    maps.begin(rings(1024))
    (reader,) = maps.take(rings(4096))
    assert reader.view(0, 4096).numel() == 4096


def test_what_went_wrong_is_told_when_they_are_taken(maps, rings, tmp_path):
    offered = rings(1024)
    (tmp_path / "control-0-0").unlink()
    maps.begin(offered)
    with pytest.raises((TransportError, OSError)):
        maps.take(offered)


def test_closing_in_the_middle_leaves_nothing_mapped(rings, tmp_path):
    offered, before = rings(1024), mappings_in(tmp_path)
    maps = RingMaps(device_index=0)
    maps.begin(offered)
    maps.close()
    maps.close()
    assert mappings_in(tmp_path) == before


def mappings_in(directory):
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())
