"""Laws of the pool, whatever is added and dropped in whatever order."""

import sys
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.dtypes import DType
from ckpt_core.manifest import Manifest, content_digest
from ckpt_core.punch import PAGE_BYTES
from ckpt_core.source import Extent, SourceFile, SourceIndex
from ckpt_core.store import Store
from ckpt_core.version_pool import VersionPool

CONTENTS = [
    bytes([number + 1]) * size for number, size in enumerate((0, 3, 300, PAGE_BYTES, 5 * PAGE_BYTES + 7, 40_000))
]

checkpoints = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(range(len(CONTENTS))), min_size=1)
additions = st.tuples(st.sampled_from(["keep", "store_copy", "own"]), checkpoints)
evictions = st.tuples(
    st.just("evict"),
    st.tuples(st.integers(0, 4), st.integers(0, 30 * PAGE_BYTES), st.sets(st.integers(0, 5), max_size=2)),
)
steps = st.lists(st.one_of(additions, additions, evictions, st.tuples(st.just("reopen"), st.none())), max_size=14)


def write(path, checkpoint):
    extents, offset = [], 0
    with path.open("wb") as file:
        for name in sorted(checkpoint):
            data = CONTENTS[checkpoint[name]]
            file.write(data)
            extents.append(
                Extent(name=name, dtype=DType.U8, shape=(len(data),), file=0, offset_bytes=offset, size_bytes=len(data))
            )
            offset += len(data)
    index = SourceIndex(files=(SourceFile.of(path),), extents=tuple(extents))
    digests = {name: content_digest(CONTENTS[number]) for name, number in checkpoint.items()}
    return index, Manifest.from_index(index, digests)


def read(index):
    files = [Path(file.path).read_bytes() for file in index.files]
    return {
        extent.name: files[extent.file][extent.offset_bytes : extent.offset_bytes + extent.size_bytes]
        for extent in index.extents
    }


class Run:
    """A pool beside what it should hold: checkpoints by digest."""

    def __init__(self, root):
        self.root = root
        self.store = Store(root / "store")
        self.pool = VersionPool(self.store, root / "pool")
        self.expected = {}

    def add(self, how, checkpoint):
        if how == "own":
            with self.pool.staging() as directory:
                record = self.pool.own(*write(directory / "staged", checkpoint), "")
        else:
            path = self.root / f"file-{len(list(self.root.iterdir()))}"
            record = getattr(self.pool, how)(*write(path, checkpoint), "")
            if how == "store_copy":
                path.unlink()
        self.expected[record.digest] = {name: CONTENTS[number] for name, number in checkpoint.items()}

    def evict(self, keep, budget_bytes, protected):
        known = [record.digest for record in self.pool.versions()]
        protect = {known[number] for number in protected if number < len(known)}
        dropped = {record.digest for record in self.pool.evict(keep, budget_bytes, protect)}
        assert not dropped & protect
        for digest in dropped:
            del self.expected[digest]
        assert len(self.expected) <= max(keep, len(protect))
        if not protect:
            assert self.pool.size_bytes <= budget_bytes

    def reopen(self):
        self.store.close()
        self.store = Store(self.root / "store")
        self.pool = VersionPool(self.store, self.root / "pool")

    def check(self):
        records = self.pool.versions()
        assert {record.digest: read(self.pool.index_of(record.digest)) for record in records} == self.expected
        places, used = {}, set()
        for record in records:
            for extent, meta in zip(record.index.extents, record.manifest.tensors, strict=True):
                path = record.index.files[extent.file].path
                if path.startswith(str(self.pool.directory)):
                    places.setdefault((meta.digest, meta.shape), set()).add((path, extent.offset_bytes))
                    first, last = (
                        extent.offset_bytes // PAGE_BYTES,
                        -(-(extent.offset_bytes + extent.size_bytes) // PAGE_BYTES),
                    )
                    used |= {(path, page) for page in range(first, last)}
        assert all(len(found) == 1 for found in places.values())
        assert self.pool.size_bytes <= len(used) * PAGE_BYTES


@settings(max_examples=60)
@given(steps)
def test_every_kept_version_reads_back_and_no_content_is_stored_twice(steps):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if sys.platform == "linux" else None) as root:
        run = Run(Path(root))
        try:
            for what, how in steps:
                if what == "evict":
                    run.evict(*how)
                elif what == "reopen":
                    run.reopen()
                else:
                    run.add(what, how)
                run.check()
        finally:
            run.store.close()
