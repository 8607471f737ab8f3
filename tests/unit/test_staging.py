"""The bytes of a bucket in the host pool: neighbours as one part, parts that are not contiguous as views, nothing copied."""

import contextlib
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.bucket import Bucket, Piece
from ckpt_core.cpu import CpuDevice
from ckpt_core.device import DevicePart
from ckpt_core.dtypes import DType
from ckpt_core.errors import ConfigError, ManifestError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest
from ckpt_core.plan import Step
from ckpt_core.pool_file import stage_tensors
from ckpt_core.source import DeviceRegion, Extent, SourceIndex
from ckpt_core.source_share import as_here, only
from ckpt_core.staging import HostPool
from ckpt_core.transport.ipc import IpcRingWriter

TENSORS = {
    "a": torch.arange(6 * 8, dtype=torch.int16).reshape(6, 8),
    "b": torch.arange(4 * 5 * 6, dtype=torch.float32).reshape(4, 5, 6),
    "c": torch.arange(100, dtype=torch.uint8),
}
NAMES = sorted(TENSORS)
STRIDED = [
    ("a", (0, 2), (6, 3)),  # columns
    ("a", (1, 7), (4, 1)),  # one of them
    ("a", (0, 0), (6, 7)),  # all but one
    ("b", (0, 1, 0), (4, 2, 6)),  # runs of rows
    ("b", (1, 0, 2), (2, 5, 3)),
    ("b", (0, 1, 1), (4, 3, 4)),
    ("b", (0, 4, 5), (4, 1, 1)),
]
CONTIGUOUS = [("a", (2, 0), (3, 8)), ("a", (3, 1), (1, 4)), ("b", (2, 1, 0), (1, 3, 6)), ("c", (7,), (31,))]


@pytest.fixture
def index(tmp_path):
    return stage_tensors(TENSORS, tmp_path)


@pytest.fixture
def pool(index):
    with contextlib.closing(HostPool(CpuDevice())) as made:
        made.adopt(index)
        yield made


def bucket_of(*parts):
    """These parts (name, start, shape; or a name alone) one behind the other, aligned."""
    pieces, offset = [], 0
    for part in parts:
        name, *cut = (part,) if isinstance(part, str) else part
        box = Box(start=cut[0], shape=cut[1]) if cut else None
        size = bytes_of(part).size
        pieces.append(Piece(tensor=NAMES.index(name), box=box, offset_bytes=offset, size_bytes=size))
        offset += -(-size // 256) * 256
    return Bucket(index=0, size_bytes=offset, pieces=tuple(pieces))


def bytes_of(part):
    name, *cut = (part,) if isinstance(part, str) else part
    tensor = TENSORS[name]
    if cut:
        tensor = tensor[Box(start=cut[0], shape=cut[1]).slices]
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def packed(parts, size):
    """As a ring has it: each part row-major at its offset."""
    made = np.full(size, 0xEE, dtype=np.uint8)
    for offset, part in parts:
        made[offset : offset + part.size] = part.reshape(-1)
    return made


def assert_holds(got, bucket, parts):
    for piece, part in zip(bucket.pieces, parts, strict=True):
        assert (got[piece.offset_bytes : piece.offset_bytes + piece.size_bytes] == bytes_of(part)).all()


@pytest.mark.parametrize("part", STRIDED)
def test_a_part_that_is_not_contiguous_is_a_view_of_its_file(pool, index, part):
    bucket = bucket_of(part)
    found = pool.parts(Manifest.from_index(index), bucket)
    for _, view in found:
        assert view.ndim == 2
        assert view.dtype == np.uint8
        assert not view.flags.writeable
        assert not view.flags.owndata
    assert sum(view.size for _, view in found) == bucket.pieces[0].size_bytes
    assert_holds(packed(found, bucket.size_bytes), bucket, [part])


def test_columns_of_consecutive_rows_are_one_view(pool, index):
    for part in STRIDED[:5]:
        assert len(pool.parts(Manifest.from_index(index), bucket_of(part))) == 1


@pytest.mark.parametrize("part", CONTIGUOUS)
def test_a_part_that_is_contiguous_is_one_run(pool, index, part):
    ((offset, run),) = pool.parts(Manifest.from_index(index), bucket_of(part))
    assert (offset, run.ndim) == (0, 1)
    assert (run == bytes_of(part)).all()


def test_parts_of_all_kinds_share_a_bucket(pool, index):
    parts = ["c", *STRIDED, *CONTIGUOUS, "a"]
    bucket = bucket_of(*parts)
    found = pool.parts(Manifest.from_index(index), bucket)
    assert {piece.offset_bytes for piece in bucket.pieces} <= {offset for offset, _ in found}
    assert_holds(packed(found, bucket.size_bytes), bucket, parts)


def test_neighbours_in_bucket_and_file_are_one_part(pool, index):
    bucket = bucket_of("a", "b")  # 96 bytes, then 480: each at a multiple of 256 in the file, too
    rows = [("c", (0,), (40,)), ("c", (40,), (60,))]
    close = Bucket(
        index=0,
        size_bytes=256,
        pieces=tuple(
            Piece(tensor=2, box=Box(start=start, shape=shape), offset_bytes=start[0], size_bytes=shape[0])
            for _, start, shape in rows
        ),
    )
    manifest = Manifest.from_index(index)
    ((_, run),) = pool.parts(manifest, close)
    assert (run == bytes_of("c")).all()
    assert len(pool.parts(manifest, bucket)) == 2, "with room between them they are not"


def test_parts_get_into_a_ring(pool, index, tmp_path):
    parts = [*STRIDED, "c"]
    bucket = bucket_of(*parts)
    (tmp_path / "rings").mkdir()
    writer = IpcRingWriter(
        owner=0, receivers=1, ring_bytes=bucket.size_bytes + 256, device=CpuDevice(), directory=tmp_path / "rings"
    )
    with contextlib.closing(writer):
        step = Step(index=0, bucket=bucket, owner=0, seq=1, ring_offset_bytes=256, free_after_seq=0, receivers=(0,))
        writer.fill(step, pool.parts(Manifest.from_index(index), bucket))
        assert writer.advance() == 1
        ring = np.fromfile(writer.offer().handle, dtype=np.uint8)
    assert not ring[:256].any()
    assert_holds(ring[256:], bucket, parts)


def test_a_pool_of_some_tensors_has_those(index):
    with contextlib.closing(HostPool(CpuDevice())) as pool:
        pool.adopt(only(index, {"b"}))
        manifest = Manifest.from_index(index)
        ((_, view),) = pool.parts(manifest, bucket_of(STRIDED[3]))
        assert (view.reshape(-1) == bytes_of(STRIDED[3])).all()
        before = pool.layout
        pool.adopt(only(index, {"b"}))
        assert pool.layout is before
        pool.adopt(only(index, {"a", "b"}))
        assert pool.layout is not before


def test_a_pool_of_nothing_holds_nothing(index):
    with contextlib.closing(HostPool(CpuDevice())) as pool:
        assert pool.adopt(only(index, ()))[0] == 0
        pool.check_unchanged()


def test_the_pool_of_a_host_notices_what_changed_there(index):
    with contextlib.closing(HostPool(CpuDevice())) as pool:
        pool.adopt(as_here(only(index, {"a"})))
        Path(index.files[0].path).unlink()
        with pytest.raises(ManifestError, match="No such file"):
            pool.check_unchanged()


class OneRegion(CpuDevice):
    """Main memory that has device memory, too, as far as addresses go."""

    def open_region(self, handle):
        return 4096, lambda: None


def test_parts_in_device_memory_are_addresses_and_travel_to_no_other_host():
    extent = Extent(name="a", dtype=DType.I16, shape=(6, 8), file=0, offset_bytes=64, size_bytes=96)
    region = DeviceRegion(uuid="GPU-0", handle="00", size_bytes=256)
    index = SourceIndex(files=(), extents=(extent,), regions=(region,))
    manifest = Manifest.from_index(index)
    with contextlib.closing(HostPool(OneRegion())) as pool:
        pool.adopt(index)
        assert pool.parts(manifest, bucket_of(CONTIGUOUS[0])) == [(0, DevicePart(address=4096 + 64 + 32, size=48))]
        with pytest.raises(ConfigError, match="tensor 'a': parts of tensors on a GPU cannot go to other hosts"):
            pool.parts(manifest, bucket_of(STRIDED[0]))


@settings(deadline=None)
@given(st.data())
def test_a_part_is_packed_row_by_row(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    start = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(data.draw(st.integers(0, extent - first)) for extent, first in zip(shape, start, strict=True))
    tensor = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    with tempfile.TemporaryDirectory() as directory:
        pool = HostPool(CpuDevice())
        pool.adopt(stage_tensors({"before": torch.ones(3), "t": tensor}, Path(directory)))
        box = Box(start=start, shape=size)
        assert pool.packed("t", box).tobytes() == tensor[box.slices].contiguous().numpy().tobytes()
        assert pool.packed("t", None).tobytes() == tensor.numpy().tobytes()
        pool.close()
