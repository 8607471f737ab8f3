"""Tensors that have only recorded slices, in a loader that keeps them for later."""

import pytest
import torch
from torch import nn

from ckpt_core.contract import LoadTensor, RecordingTarget
from ckpt_core.dtypes import DType
from ckpt_core.errors import EngineError
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.record.recorder import record
from ckpt_core.record.thin import retained_bytes, thin

CPU = torch.device("cpu")
SHAPE = (8, 6)


class Keeping(nn.Module):
    """Its loader keeps what it is given, and copies this rank's half when it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.kept = []

    def load_weights(self, weights):
        self.kept += [tensor for _, tensor in weights]

    def load_at_once(self, weights):
        self.load_weights(weights)
        self.complete()

    def complete(self):
        for tensor in self.kept:
            self.weight.data.copy_(tensor.narrow(0, 4, 4).t())
        self.kept.clear()


@pytest.fixture
def recording():
    model = Keeping()
    manifest = Manifest(tensors=(TensorMeta(name="w", dtype=DType.F32, shape=SHAPE),))
    return record(RecordingTarget(model=model, load=model.load_at_once, live=model), manifest, device=CPU)


def test_it_owns_its_slice_and_no_more(recording):
    ring = torch.arange(48.0).reshape(SHAPE)
    expected = ring[4:].t().clone()
    model, item = Keeping(), thin(LoadTensor(name="w", tensor=ring), recording)
    model.load_weights([("w", item.tensor)])
    assert retained_bytes(item.tensor) == 4 * 6 * 4
    ring.zero_()  # the ring goes on to other buckets
    model.complete()
    assert torch.equal(model.weight, expected)


def test_another_slice_than_the_recorded_one_is_an_error(recording):
    item = thin(LoadTensor(name="w", tensor=torch.zeros(SHAPE)), recording)
    with pytest.raises(EngineError, match=r"'w'.*--no-replay"):
        torch.zeros(4, 6).copy_(item.tensor[:4])


@pytest.mark.parametrize("use", [lambda t: torch.zeros(4).fill_(t[0, 0].item()), lambda t: torch.zeros(SHAPE).add_(t)])
def test_a_value_is_an_error(recording, use):
    with pytest.raises(EngineError, match="no-replay"):
        use(thin(LoadTensor(name="w", tensor=torch.zeros(SHAPE)), recording).tensor)


def test_what_is_only_counted_is_not_copied(recording):
    item = thin(LoadTensor(name="w", tensor=torch.ones(SHAPE)), recording)
    meta = torch.empty(4, 6, device="meta")
    assert meta.copy_(item.tensor[4:]) is meta


def test_parts_and_unknown_tensors_stay_as_they_are(recording):
    part = LoadTensor(name="w", tensor=torch.ones(2, 6), box=Box(start=(4, 0), shape=(2, 6)))
    other = LoadTensor(name="other", tensor=torch.ones(2))
    assert thin(part, recording) is part
    assert thin(other, recording) is other
    assert retained_bytes(other.tensor) is None
