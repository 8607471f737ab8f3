"""Loaders of all kinds, recorded without data: what is copied where, what is opaque and why, and nothing touched."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ckpt_core.contract import LoadTensor, RecordingTarget
from ckpt_core.dtypes import DType
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.record.components import components
from ckpt_core.record.recorder import record
from ckpt_core.record.replay import Replay
from ckpt_core.record.watch import named_tensors

RANK, WORLD = 1, 2
CPU = torch.device("cpu")


def shard(tensor, dim):
    """This rank's part."""
    size = tensor.shape[dim] // WORLD
    return tensor.narrow(dim, RANK * size, size)


class Model(nn.Module):
    """A model with a loader for each of its parameters, as engines have them."""

    def __init__(self, device=None):
        super().__init__()

        def make(*shape, dtype=torch.bfloat16):
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.fused = nn.Module()
        self.fused.weight = make(12, 8)
        self.row = nn.Module()
        self.row.weight = make(8, 4)
        self.turned = nn.Module()
        self.turned.weight = make(6, 8)
        self.experts = nn.Module()
        self.experts.w13 = make(2, 8, 6)
        self.padded = nn.Module()
        self.padded.weight = make(5, 4)
        self.tied = nn.Module()
        self.tied.weight = self.padded.weight
        self.cast = nn.Module()
        self.cast.weight = make(8, dtype=torch.float32)
        self.repeated = nn.Module()
        self.repeated.weight = make(3, 4)
        self.cloned = nn.Module()
        self.cloned.weight = make(4, 2)
        self.moved = nn.Module()
        self.moved.weight = make(4)
        self.gemma = nn.Module()
        self.gemma.weight = make(8)
        self.joined = nn.Module()
        self.joined.weight = make(4, 3)
        self.scalar = nn.Module()
        self.scalar.scale = make(1, dtype=torch.float32)
        self.table = nn.Module()
        self.table.register_buffer("positions", torch.zeros(4, device=device))

    def load_weights(self, weights):
        """Whole checkpoint tensors in; this rank's parts land in parameters."""
        for name, tensor in weights:
            getattr(self, "_" + name.replace(".", "_"))(tensor)

    def _q(self, tensor):
        self.fused.weight.data.narrow(0, 0, 8).copy_(shard(tensor, 0))

    def _k(self, tensor):
        self.fused.weight.data[8:12].copy_(tensor.chunk(WORLD, dim=0)[RANK])

    def _o(self, tensor):
        self.row.weight.data.copy_(shard(tensor, 1))

    def _turned(self, tensor):
        self.turned.weight.data.copy_(tensor.t()[:, : tensor.shape[0]])

    def _expert_0(self, tensor):
        self.experts.w13.data[0].narrow(0, 0, 4).copy_(shard(tensor, 0))

    def _all_experts(self, tensor):
        self.experts.w13.data[:, 4:].copy_(tensor.view(2, 2, 4, 6)[:, RANK])

    def _expert_1(self, tensor):
        self.experts.w13.data[1, :4].copy_(shard(tensor, 0))

    def _vocabulary(self, tensor):
        self.padded.weight.data[:3].copy_(tensor[3:6])
        self.padded.weight.data[3:].fill_(0)

    def _cast(self, tensor):
        self.cast.weight.data.copy_(tensor)

    def _repeated(self, tensor):
        self.repeated.weight.data.copy_(tensor.expand(3, 4))

    def _cloned(self, tensor):
        self.cloned.weight.data.copy_(tensor[1:3].clone().t().contiguous()[:, :2])

    def _moved(self, tensor):
        self.moved.weight.data.copy_(tensor.to("cpu", torch.bfloat16).contiguous())

    def _gemma(self, tensor):
        tensor += 1.0
        self.gemma.weight.data.copy_(tensor)

    def _joined_a(self, tensor):
        self.first = tensor

    def _joined_b(self, tensor):
        self.joined.weight.data.copy_(torch.cat([self.first, tensor]))
        del self.first

    def _scale(self, tensor):
        self.scalar.scale.data.fill_(tensor.item())

    def _skipped(self, tensor):
        pass

    def _strange(self, tensor):
        raise KeyError("strange")


BF16 = DType.BF16
SHAPES = {
    "q": (16, 8),
    "k": (8, 8),
    "o": (8, 8),
    "turned": (8, 6),
    "expert.0": (8, 6),
    "expert.1": (8, 6),
    "all_experts": (2, 8, 6),
    "vocabulary": (6, 4),
    "cast": (8,),
    "repeated": (4,),
    "cloned": (4, 4),
    "moved": (4,),
    "gemma": (8,),
    "joined.a": (2, 3),
    "joined.b": (2, 3),
    "scale": (1,),
    "skipped": (4,),
    "strange": (4,),
}
OPAQUE = {"gemma": "add_", "joined.a": "cat", "joined.b": "cat", "scale": "value", "strange": "KeyError"}


def manifest_of(shapes):
    return Manifest(
        tensors=tuple(
            TensorMeta(name=name, dtype=DType.F32 if name == "scale" else BF16, shape=shape)
            for name, shape in sorted(shapes.items())
        )
    )


@pytest.fixture
def model():
    live = Model()
    for number, parameter in enumerate(live.parameters()):
        parameter.data.fill_(number + 40)
    return live


def checkpoint(seed):
    torch.manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float32 if name == "scale" else torch.bfloat16)
        for name, shape in SHAPES.items()
        if name != "strange"
    }


def recording_of(live, model=None):
    target = RecordingTarget(model=model or live, load=(model or live).load_weights, live=live)
    return record(target, manifest_of(SHAPES), device=CPU)


def state_of(live):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in named_tensors(live).items()}


def test_nothing_of_the_live_model_is_touched(model):
    before = state_of(model)
    recording_of(model)
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, (address, value) in before.items():
        assert after[name][0] == address
        assert torch.equal(after[name][1], value)


@pytest.mark.parametrize("blank", [False, True])
def test_what_is_opaque_is_named_with_its_operation(model, blank):
    recording = recording_of(model, Model(device="meta") if blank else None)
    assert recording.opaque.keys() == OPAQUE.keys()
    for name, operation in OPAQUE.items():
        assert operation in recording.opaque[name]
    assert "skipped" not in recording.needed
    assert recording.reaches["gemma"] == {"gemma.weight"}
    assert recording.reaches["scale"] == {"scalar.scale"}
    assert recording.shared == {"tied.weight": "padded.weight"}


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_a_replay_is_what_the_loader_does(model, blank, rows):
    recording = recording_of(model, Model(device="meta") if blank else None)
    weights = checkpoint(1)
    expected = copy.deepcopy(model)
    expected.load_weights((name, tensor.clone()) for name, tensor in weights.items())
    sizes = {name: tensor.numel() for name, tensor in named_tensors(model).items()}
    replayed = [one for one in components(recording, sizes, {}) if not one.why_not]
    parameters = {name: named_tensors(model)[name] for one in replayed for name in one.parameters}
    roots = frozenset().union(*(one.roots for one in replayed))
    assert roots == SHAPES.keys() - OPAQUE.keys() - {"skipped"}
    replay = Replay(recording, parameters, roots)
    replay.fill()
    for number, name in enumerate(sorted(roots)):
        replay.load(number, tuple(pieces(name, weights[name], rows)))
    for name in parameters:
        assert torch.equal(named_tensors(model)[name], named_tensors(expected)[name]), name


def pieces(name, tensor, rows):
    """The whole tensor, or runs of its rows."""
    if rows is None:
        yield LoadTensor(name=name, tensor=tensor)
        return
    for first in range(0, tensor.shape[0], rows):
        part = tensor[first : first + rows]
        box = Box(start=(first, *[0] * (tensor.dim() - 1)), shape=tuple(part.shape))
        yield LoadTensor(name=name, tensor=part.clone(), box=box)


def test_needed_boxes_are_this_ranks_slices(model):
    recording = recording_of(model)
    assert recording.boxes_of("q") == (Box(start=(8, 0), shape=(8, 8)),)
    assert recording.boxes_of("o") == (Box(start=(0, 4), shape=(8, 4)),)
    assert recording.boxes_of("vocabulary") == (Box(start=(3, 0), shape=(3, 4)),)
    assert recording.boxes_of("all_experts") == (Box(start=(0, 4, 0), shape=(2, 4, 6)),)


def test_an_excluded_module_keeps_its_tensors_for_the_loader(model):
    recording = recording_of(model)
    sizes = {name: tensor.numel() for name, tensor in named_tensors(model).items()}
    found = components(recording, sizes, {"fused": "packed"})
    (fused,) = [one for one in found if "q" in one.roots]
    assert fused.roots == {"q", "k"}
    assert "packed" in fused.why_not


def test_a_parameter_that_is_not_filled_whole_is_not_replayed(model):
    target = RecordingTarget(model=model, load=model.load_weights, live=model)
    recording = record(target, manifest_of({"q": (16, 8)}), device=CPU)
    sizes = {name: tensor.numel() for name, tensor in named_tensors(model).items()}
    (found,) = components(recording, sizes, {})
    assert "64 of 96" in found.why_not


def test_copies_of_a_loaders_threads_are_seen(model):
    def load(weights):
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(model.load_weights, [one]) for one in weights]:
                done.result()

    names = ("q", "k", "o")
    target = RecordingTarget(model=model, load=load, live=model)
    recording = record(target, manifest_of({name: SHAPES[name] for name in names}), device=CPU)
    assert {one.root for one in recording.copies} == set(names)
    assert not recording.opaque


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.view(-1).add_(1),
        lambda tensor: tensor.detach().add_(1),
        lambda tensor: tensor.data.mul_(2),
        lambda tensor: tensor[:1].zero_(),
    ],
)
def test_a_source_that_is_written_to_by_another_name_is_opaque(model, change):
    def load(weights):
        for _, tensor in weights:
            change(tensor)
            model.moved.weight.data.copy_(tensor)

    target = RecordingTarget(model=model, load=load, live=model)
    assert "moved" in record(target, manifest_of({"moved": (4,)}), device=CPU).opaque


@pytest.mark.parametrize(
    "write",
    [
        lambda parameter: torch.neg(parameter, out=parameter),
        lambda parameter: torch._foreach_mul_([parameter], 2),
        lambda parameter: parameter.mul_(2),
    ],
)
def test_plain_writes_are_seen_and_do_not_happen(model, write):
    def load(weights):
        for _, tensor in weights:
            model.moved.weight.data.copy_(tensor)
            write(model.moved.weight.data)

    before = state_of(model)
    recording = record(RecordingTarget(model=model, load=load, live=model), manifest_of({"moved": (4,)}), device=CPU)
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in named_tensors(model).items())
    sizes = {name: tensor.numel() for name, tensor in named_tensors(model).items()}
    assert all(one.why_not for one in components(recording, sizes, {}))
