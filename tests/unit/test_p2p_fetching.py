"""The loop that reads from owners, over a stand-in for the library: right bytes whatever owners do, as long as one is good."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path
from one_sided import FakeOneSided, Fault

from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import ConfigError, ManifestError, PeerLost, TransferTimeout, VerificationError
from ckpt_core.layout import whole_layout
from ckpt_core.leaf_digest import LEAF_BYTES
from ckpt_core.manifest import Manifest
from ckpt_core.p2p.covers import covers_of, slot_bytes
from ckpt_core.p2p.exporting import exported
from ckpt_core.p2p.fetching import Fetch
from ckpt_core.p2p.incoming_bucket import Leaves
from ckpt_core.p2p.offers import index_of, read_offer, write_offer
from ckpt_core.p2p.owners import CHUNK_BYTES, Owners
from ckpt_core.p2p.rate import TokenBucket
from ckpt_core.plan import make_plan
from ckpt_core.polling import Poller
from ckpt_core.pool_file import stage_tensors
from ckpt_core.source import RemoteOwner
from ckpt_core.staging import HostPool
from ckpt_core.transport.p2p.base import Memory

KIB = 1 << 10
SIZES = (1, 100, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES + 5, CHUNK_BYTES + 3 * LEAF_BYTES, 0)


class Writer:
    """Keeps what is filled in; every bucket is read at once."""

    def __init__(self):
        self.filled = {}

    def fill(self, step, parts):
        data = np.zeros(step.bucket.size_bytes, dtype=np.uint8)
        for offset, part in parts:
            data[offset : offset + part.size] = part
        self.filled[step.seq] = data

    def advance(self):
        return max(self.filled, default=0)

    done = advance


@pytest.fixture
def version(tmp_path):
    """Index and pool of one version with tensors of SIZES."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"t{number}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(SIZES)
    }
    index = stage_tensors(tensors, tmp_path)
    with ExitStack() as stack:
        pool = HostPool(CpuDevice())
        stack.callback(pool.close)
        pool.adopt(index)
        yield index, pool


@pytest.fixture
def join(version):
    """Reads the version from owners with these faults; what was filled in, and the library."""
    index, pool = version

    def join(faults, *, limit=None, stalled_s=5.0, timeout_s=20.0, slots=3, bucket_bytes=300 * KIB):
        library = FakeOneSided(faults)
        with ExitStack() as stack:
            offers = [stack.enter_context(exported(index, FakeOneSided(contact=name), owner=name)) for name in faults]
            remote = index_of(offers, host="127.0.0.1")
            manifest = Manifest.from_index(remote)
            ring = max(1 << 20, bucket_bytes)
            plan = make_plan(manifest, [whole_layout(manifest)], agents=1, ring_bytes=ring, bucket_bytes=bucket_bytes)
            covers = [covers_of(step, remote.extents) for step in plan.steps]
            room = max(map(slot_bytes, covers))

            def slot():
                made = np.zeros(room, dtype=np.uint8)
                library.expose(Memory(address=made.ctypes.data, size_bytes=made.size))
                return made

            writer = Writer()
            owners = Owners(library, remote.remote.owners)
            fetch = Fetch(
                Leaves(remote.extents, remote.remote.leaves),
                plan.steps,
                covers,
                owners=owners,
                slots=[slot() for _ in range(slots)],
                spare=slot,
                writer=writer,
                limit=limit,
                stalled_s=stalled_s,
            )
            stats = fetch.run(
                Poller(check=lambda: None, deadline=time.monotonic() + timeout_s, expired=TransferTimeout)
            )
            for step in plan.steps:
                for offset, part in pool.parts(manifest, step.bucket):
                    assert np.array_equal(writer.filled[step.seq][offset : offset + part.size], part), step.index
            return stats, owners.got_bytes

    return join


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_owners_give_their_share(join, count):
    stats, got = join({f"o{number}": Fault(slow=2) for number in range(count)})
    assert stats.network_in_bytes == sum(got.values()) >= sum(SIZES)
    assert min(got.values()) > 0


@pytest.mark.parametrize(
    "fault",
    [Fault(dies_after=0), Fault(dies_after=3), Fault(dies_after=3, slow=50), Fault(flips=True), Fault(stalls=True)],
    ids=str,
)
def test_one_owner_fails_and_the_others_give_all(join, fault):
    _, got = join({"good": Fault(slow=1), "bad": fault, "fine": Fault(slow=3)}, stalled_s=0.3)
    assert got["good"] > 0


def test_an_owner_is_asked_again_when_its_bucket_was_begun_anew(join, monkeypatch):
    """What it still has to deliver to a bucket that nobody waits for does not count against it."""
    monkeypatch.setattr("ckpt_core.p2p.owners._WINDOW_BYTES", 1)  # one chunk at a time
    faults = {"silent": Fault(stalls=True), "slow": Fault(takes_s=0.3)}
    _, got = join(faults, stalled_s=1.0, slots=1, bucket_bytes=16 << 20)
    assert got["slow"] >= sum(SIZES)


def test_an_owner_whose_bytes_are_wrong_is_told_from_those_that_are_right(join):
    join({"bad": Fault(flips=True), "good": Fault(), "worse": Fault(flips=True)})


@pytest.mark.parametrize("fault", [Fault(dies_after=5), Fault(flips=True), Fault(stalls=True)], ids=str)
def test_nobody_is_left(join, fault):
    with pytest.raises(PeerLost, match="no owner is left") as caught:
        join({"one": fault}, stalled_s=0.2)
    assert "one" in str(caught.value)


def test_the_rate_is_kept(join):
    rate = 20e6
    start = time.monotonic()
    stats, _ = join({"one": Fault()}, limit=TokenBucket(rate, burst_bytes=CHUNK_BYTES))
    assert time.monotonic() - start >= (stats.network_in_bytes - CHUNK_BYTES) / rate


def test_a_deadline_ends_it(join):
    with pytest.raises(TransferTimeout, match="bytes from one"):
        join({"one": Fault(stalls=True)}, timeout_s=0.3)


# -- offers ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def offer(version):
    with exported(version[0], FakeOneSided(contact="a"), owner="one", version="v1") as made:
        yield made


def test_an_offer_survives_its_file(offer, tmp_path):
    write_offer(offer, tmp_path / "offer.json")
    assert read_offer(tmp_path / "offer.json") == offer
    assert offer.version == "v1"


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[: len(text) // 2], "expected what `ckpt export` wrote"),
        (lambda text: text.replace(b'"format": 1', b'"format": 9'), "format"),
        (lambda text: text.replace(b'"name": "t0"', b'"name": "aa"'), "digest"),
        (lambda text: text.replace(b'"owner"', b'"proprietor"'), "expected what `ckpt export` wrote"),
    ],
)
def test_a_damaged_file_is_refused(offer, tmp_path, damage, error):
    path = tmp_path / "offer.json"
    write_offer(offer, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ConfigError, ManifestError), match=error):
        read_offer(path)


def test_offers_of_different_versions_do_not_mix(offer, tmp_path):
    index = stage_tensors({"t0": torch.ones(3)}, tmp_path)
    with (
        exported(index, FakeOneSided(contact="b"), owner="two") as other,
        pytest.raises(VerificationError, match="one version"),
    ):
        index_of([offer, other], host="h")


def test_an_owner_is_named_once(offer):
    with pytest.raises(ConfigError, match="twice"):
        index_of([offer, offer], host="h")
    with pytest.raises(ConfigError, match="no offers"):
        index_of([], host="h")


def test_owners_of_one_name_are_told_apart(offer, version):
    with exported(version[0], FakeOneSided(contact="b"), owner="one") as other:
        names = [owner.name for owner in index_of([offer, other], host="h").remote.owners]
    assert names == ["one (0)", "one (1)"]


# -- whom to ask -------------------------------------------------------------------------------------------------------
def owners_of(*remotes, **options):
    library = FakeOneSided({remote.contact: Fault() for remote in remotes})
    room = np.zeros(CHUNK_BYTES, dtype=np.uint8)
    library.expose(Memory(address=room.ctypes.data, size_bytes=room.size))
    made = Owners(library, remotes, **options)
    return made, lambda name: made.read(name, 0, 0, room.ctypes.data, CHUNK_BYTES)


def remote_owner(name, **options):
    return RemoteOwner(name=name, library="nixl", contact=name, addresses=(0,), **options)


def test_whoever_should_give_more_is_asked_more():
    owners, read = owners_of(remote_owner("much", share=0.75), remote_owner("little", share=0.25))
    asked = []
    while (name := owners.next(())) is not None:
        asked.append(name)
        read(name)
    assert asked[:4].count("much") == 3
    assert asked.count("little") == asked.count("much"), "as long as both keep up, windows decide"


def test_an_owner_is_not_asked_faster_than_it_wants():
    limited, free = remote_owner("limited", max_bytes_per_s=1e6), remote_owner("free")
    owners, read = owners_of(limited, free, readers=2)
    assert owners.next({"free"}) == "limited"
    read("limited")
    read("limited")
    assert owners.next({"free"}) is None
    assert owners.next(()) == "free"
