"""What a plugin's load hook gets from a bucket, and what is done with its answer."""

import types

import pytest
import torch

from ckpt_core.apply import Applier
from ckpt_core.config import VerifyLevel
from ckpt_core.contract import LoadReport, Update
from ckpt_core.cpu import CpuDevice
from ckpt_core.errors import CoverageError, VerificationError
from ckpt_core.incoming import Incoming
from ckpt_core.layout import Box, Layout, LayoutEntry, whole_layout
from ckpt_core.manifest import Manifest
from ckpt_core.plan import make_plan
from ckpt_core.plan_parts import PlanParts
from ckpt_core.pool_digests import PoolDigests
from ckpt_core.pool_file import stage_tensors
from ckpt_core.staging import HostPool
from ckpt_core.transport.local import Faults, LocalRing, LocalRingReader, LocalRingWriter
from ckpt_core.verify import Verifier
from ckpt_core.wanted import Wanted

TENSORS = {
    "bf": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "empty": torch.empty(0, 4),
    "f32": torch.linspace(0, 1, 7),
    "fp8": torch.ones(5).to(torch.float8_e4m3fn),
    "int": torch.tensor([[2**60], [-1]]),
    "scalar": torch.tensor(2.5),
}
UPDATE = Update(update_id="u", version="v", digest="d", expected=frozenset(TENSORS))


class Plugin:
    """Keeps what it is given; answers as told."""

    def __init__(self, answer=None):
        self.got, self.buckets = {}, []
        self.answer = answer or (lambda bucket: LoadReport(loaded=tuple(item.name for item in bucket.tensors)))
        self.hook = types.SimpleNamespace(ckpt_load=self._load)

    def _load(self, *, worker, update, bucket):
        assert (worker, update) == ("worker", UPDATE)
        self.buckets.append(bucket.index)
        for item in bucket.tensors:
            self.got.setdefault(item.name, []).append((item.box, item.tensor.clone(), item.tensor.is_contiguous()))
        return self.answer(bucket)


@pytest.fixture
def apply(tmp_path):
    """Runs all buckets of a layout through an applier."""
    index = stage_tensors(TENSORS, tmp_path)
    pool = HostPool(CpuDevice())
    pool.adopt(index)
    manifest = Manifest.from_index(index, {name: pool.digest(name) for name in TENSORS})

    def apply(plugin, *, layout=None, faults=None, digest=True, bucket_bytes=256):
        plan = make_plan(
            manifest, [layout or whole_layout(manifest)], agents=1, ring_bytes=1 << 16, bucket_bytes=bucket_bytes
        )
        incoming = Incoming(plan, Wanted(manifest, layout or whole_layout(manifest)))
        parts = PlanParts(manifest)
        parts.add(plan, 0, layout or whole_layout(manifest))
        found = PoolDigests(pool, share=1, told=lambda _done: None).of_parts(manifest, parts.parts)
        expected = parts.of_rank(0, parts.gathered([(parts.parts, found)]))
        verifier = Verifier(VerifyLevel.ARRIVAL if digest else VerifyLevel.NONE, expected)
        applier = Applier(plugin, "worker", UPDATE, incoming, verifier)
        applier.verifier = verifier
        ring = LocalRing(owner=0, receivers=1, ring_bytes=plan.ring_bytes)
        writer, reader = LocalRingWriter(ring, faults), LocalRingReader(ring, receiver=0)
        incoming.map([reader], plan.ring_bytes)
        for step in plan.steps:
            writer.fill(step, pool.parts(manifest, step.bucket))
            applier.consume(step)
        return applier

    yield apply
    pool.close()


@pytest.mark.parametrize("bucket_bytes", [256, 1 << 16])
def test_tensors_come_with_their_bits_dtype_and_shape(apply, bucket_bytes):
    plugin = Plugin()
    applier = apply(plugin, bucket_bytes=bucket_bytes)
    assert plugin.got.keys() == TENSORS.keys()
    for name, ((box, tensor, contiguous),) in plugin.got.items():
        assert box is None
        assert contiguous
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), TENSORS[name].view(-1).view(torch.uint8))
    assert plugin.buckets == list(range(len(plugin.buckets)))
    assert applier.verifier.arrived_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert applier.received_bytes == applier.verifier.arrived_bytes


def test_parts_say_which_part(apply):
    plugin = Plugin()
    rows = Box(start=(1, 0), shape=(2, 4))
    apply(plugin, layout=Layout(entries=(LayoutEntry(tensor="bf", box=rows, cut=True),)))
    ((box, tensor, _),) = plugin.got["bf"]
    assert box == rows
    assert torch.equal(tensor, TENSORS["bf"][1:])


def test_wrong_bytes_never_reach_the_plugin(apply):
    plugin = Plugin()
    with pytest.raises(VerificationError, match="'bf'"):
        apply(plugin, faults=Faults(flip={1: 0}), bucket_bytes=1 << 16)
    assert plugin.got == {}


def test_without_digests_they_do(apply):
    plugin = Plugin()
    applier = apply(plugin, faults=Faults(flip={1: 0}), digest=False)
    assert plugin.got.keys() == TENSORS.keys()
    assert applier.verifier.arrived_bytes == 0


def test_the_answer_is_added_up(apply):
    def answer(bucket):
        names = [item.name for item in bucket.tensors]
        return LoadReport(
            loaded=tuple(name for name in names if name != "f32"),
            ignored=tuple(name for name in names if name == "f32"),
            retained_bytes=100 if "int" in names else 7,
        )

    applier = apply(Plugin(answer))
    assert applier.ignored == ["f32"]
    assert applier.retained_bytes == 100


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda _bucket: None, "must return a LoadReport, got None"),
        (lambda _bucket: {"loaded": []}, "must return a LoadReport"),
        (lambda _bucket: LoadReport(loaded=()), r"did not account for \['bf'"),
        (
            lambda bucket: LoadReport(loaded=(*(item.name for item in bucket.tensors), "more")),
            r"reported \['more'\] which it was not given",
        ),
    ],
)
def test_an_answer_that_does_not_account_for_all_is_refused(apply, answer, says):
    with pytest.raises(CoverageError, match=says):
        apply(Plugin(answer), bucket_bytes=1 << 16)
