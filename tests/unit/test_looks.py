"""What a look compares, by itself: parts of a recorded loader, the ranks' answers, and what follows from them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_core import wire
from ckpt_core.contract import RecordingTarget
from ckpt_core.dtypes import DType
from ckpt_core.errors import VerificationError, WireError
from ckpt_core.inspection import _check_parts
from ckpt_core.layout import Box
from ckpt_core.leaf_digest import run_digest
from ckpt_core.look_findings import check_equal, engine_looks
from ckpt_core.look_report import EngineLook, LookReport
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.plan_parts import PlanParts
from ckpt_core.rank_look import compared
from ckpt_core.record.comparable import comparable
from ckpt_core.record.recorder import record

SHAPES = {
    "whole": (6, 4),
    "column": (4, 8),
    "turned": (3, 5),
    "even_odd": (6, 2),
    "twice": (4, 2),
    "partial": (8, 2),
    "cast": (4,),
    "repeated": (3,),
    "computed": (4,),
    "packed": (4, 4),
    "over": (4,),
    "empty": (0, 4),
    "scalar": (),
    "unknown": (2,),
}
MANIFEST = Manifest(
    tensors=tuple(TensorMeta(name=name, dtype=DType.BF16, shape=shape) for name, shape in sorted(SHAPES.items()))
)
COMPARABLE = {"whole", "column", "turned", "even_odd", "twice", "partial", "scalar"}


class Model(nn.Module):
    """One module for each way in which a loader may put a tensor."""

    def __init__(self, device="cpu"):
        super().__init__()
        shapes = {
            "whole": (6, 4),
            "column": (4, 4),
            "turned": (5, 3),
            "even_odd": (2, 3, 2),
            "twice": (2, 4, 2),
            "partial": (6, 2),
            "cast": (4,),
            "repeated": (2, 3),
            "computed": (4,),
            "packed": (4, 4),
            "over": (4,),
            "empty": (1, 4),
            "scalar": (1,),
        }
        for name, shape in shapes.items():
            module = nn.Module()
            dtype = torch.float32 if name == "cast" else torch.bfloat16
            module.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            self.add_module(name, module)

    def load(self, weights):
        for name, tensor in weights:
            if name == "unknown":
                continue
            into = self.get_submodule(name).weight.data
            match name:
                case "column":
                    into.copy_(tensor[:, 4:])
                case "turned":
                    into.copy_(tensor.t())
                case "even_odd":
                    into[0].copy_(tensor[::2])
                    into[1].copy_(tensor[1::2])
                case "twice":
                    into[0].copy_(tensor)
                    into[1].copy_(tensor)
                case "partial":
                    into[:3].copy_(tensor[:3])  # the other half is never written
                case "computed":
                    into.copy_(tensor + 1)
                case "over":
                    into.fill_(0)
                    into.copy_(tensor)
                case "empty":
                    into[:0].copy_(tensor)
                case _:
                    into.copy_(tensor)


@pytest.fixture
def live():
    """The model with weights, the tensors that it was loaded from, and what of it can be compared."""
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in SHAPES.items()}
    blank, model = Model("meta"), Model()
    model.load(tensors.items())
    target = RecordingTarget(model=blank, load=blank.load, live=model, excluded={"packed": "packed"})
    return model, tensors, comparable(target, record(target, MANIFEST, device=torch.device("cpu")), MANIFEST)


def digests_of(parts, tensors):
    """As agents make them."""
    found = []
    for part in parts:
        tensor = tensors[MANIFEST.tensors[part.tensor].name]
        box = tensor if part.box is None else tensor[part.box.slices]
        found.append(run_digest(box.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return np.array(found, dtype="<u8").tobytes()


def test_pure_copies_are_compared_and_all_others_named(live):
    _, tensors, found = live
    assert {MANIFEST.tensors[part.tensor].name for part in found.parts} == COMPARABLE
    assert dict(found.unchecked) == {"cast": 8, "repeated": 12, "computed": 8, "packed": 32, "over": 8}
    answer = compared(found, digests_of(found.parts, tensors), "f")
    assert answer.differing == ()
    assert answer.equal_bytes == 2 * (24 + 16 + 15 + 12 + 2 * 8 + 6 + 1)  # "twice" lives twice, both are compared


@pytest.mark.parametrize("name", sorted(COMPARABLE))
def test_every_bit_that_is_compared_counts(live, name):
    model, tensors, found = live
    model.get_submodule(name).weight.data.view(-1)[:1].view(torch.uint8)[0] ^= 1
    answer = compared(found, digests_of(found.parts, tensors), "")
    assert (answer.differing, answer.differing_count) == ((name,), 1)
    assert answer.differing_bytes > 0


def test_a_live_tensor_of_another_form_is_not_compared():
    blank, model = Model("meta"), Model()
    model.column.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16).t(), requires_grad=False)
    del model.turned
    target = RecordingTarget(model=blank, load=blank.load, live=model)
    found = comparable(target, record(target, MANIFEST, device=torch.device("cpu")), MANIFEST)
    assert {"column", "turned"} <= set(found.unchecked)
    assert "whole" not in found.unchecked


def test_another_number_of_digests_is_refused(live):
    with pytest.raises(WireError, match=f"digests of {len(live[2].parts)} parts, got 1"):
        compared(live[2], bytes(8), "")


def test_an_answer_is_small_whatever_tensors_are_called(live):
    _, _, found = live
    for home in found.homes:
        home.part.item.name = f"{home.part.item.name}{'x' * 100_000}"
    answer = compared(found, bytes(8 * len(found.parts)), "")
    assert len(wire.encode(answer, token="t", seq=1)) < wire.MAX_SMALL_BYTES  # noqa: S106


def test_parts_of_all_ranks_are_digested_once():
    first, second = wire.PartOf(tensor=0, box=None), wire.PartOf(tensor=1, box=Box(start=(0, 4), shape=(4, 4)))
    parts = PlanParts(MANIFEST)
    for mine in ([first, second], [second, second], []):
        parts.add_parts(mine)
    assert parts.parts == (first, second)
    digests = parts.gathered([([second], bytes([2] + [0] * 7)), ([first], bytes([1] + [0] * 7))])
    assert [list(parts.of_rank(rank, digests)[0][::8]) for rank in range(3)] == [[1, 2], [2, 2], []]


@pytest.mark.parametrize(
    "part",
    [
        wire.PartOf(tensor=-1, box=None),
        wire.PartOf(tensor=len(SHAPES), box=None),
        wire.PartOf(tensor=0, box=Box(start=(0, 0), shape=(7, 4))),
        wire.PartOf(tensor=0, box=Box(start=(0, 0, 0), shape=(1, 1, 1))),
    ],
)
def test_a_part_of_what_is_not_there_is_refused(part):
    with pytest.raises(WireError, match="rank 0"):
        _check_parts(wire.HeldSlices(parts=(part,)), MANIFEST, "rank 0")


# -- what follows ---------------------------------------------------------------------------------------------------
def looked(held, answers, recorded=()):
    """One engine with these ranks."""
    peers = [bytes([number]) for number in range(len(held))]
    inspection = SimpleNamespace(
        boarding=SimpleNamespace(hellos={peer: SimpleNamespace(endpoint_index=0) for peer in peers}),
        held=dict(zip(peers, held, strict=True)),
        compared=dict(zip(peers, answers, strict=True)),
    )
    fleet = SimpleNamespace(members=[SimpleNamespace(endpoint=SimpleNamespace(url="u", engine="e"))])
    return engine_looks(fleet, inspection, "A", "d", {"u": recorded})["u"]


def test_ranks_make_one_engine():
    held = [
        wire.HeldSlices(parts=(), unchecked=("a", "b"), unchecked_bytes=10),
        wire.HeldSlices(parts=(), unchecked=("b",), unchecked_bytes=10, why="no"),
    ]
    answers = [
        wire.Compared(equal_bytes=50, differing_bytes=10, differing=("x",), differing_count=1, fingerprint="1"),
        wire.Compared(equal_bytes=20, differing=("x", "y"), differing_count=30, fingerprint="2"),
    ]
    look = looked(held, answers, recorded=("1", "2"))
    assert (look.equal_bytes, look.unchecked, look.unchecked_count) == (70, ("a", "b"), 2)
    assert (look.differing, look.differing_count, look.notes) == (("x", "y"), 30, ("no",))
    assert (look.checked_share, look.as_committed, look.equal) == (0.8, True, False)
    with pytest.raises(VerificationError, match="'x', 'y'"):
        check_equal(look)


@pytest.mark.parametrize(
    ("answer", "recorded", "as_committed", "equal", "refused"),
    [
        (wire.Compared(equal_bytes=1, fingerprint="1"), (), None, True, ""),
        (wire.Compared(equal_bytes=1, fingerprint="1"), ("1",), True, True, ""),
        (wire.Compared(equal_bytes=1, fingerprint="1"), ("2",), False, False, "other fingerprints"),
        (wire.Compared(equal_bytes=1, fingerprint=""), ("2",), None, True, ""),
        (wire.Compared(fingerprint="1"), ("1",), True, True, "nothing of version A could be compared"),
        (wire.Compared(fingerprint="1"), (), None, False, "nothing of version A could be compared"),
    ],
)
def test_what_proves_a_version(answer, recorded, as_committed, equal, refused):
    look = looked([wire.HeldSlices(parts=())], [answer], recorded)
    assert (look.as_committed, look.equal) == (as_committed, equal)
    if refused:
        with pytest.raises(VerificationError, match=refused):
            check_equal(look)
    else:
        check_equal(look)


def test_a_report_says_in_json_what_follows():
    look = EngineLook(endpoint="u", engine="e", version="A", digest="d", equal_bytes=3, unchecked_bytes=1)
    report = LookReport(engines=(look,), seconds=1.0, pause_s=0.5)
    found = json.loads(report.to_json())
    assert (found["equal"], found["engines"][0]["checked_share"]) == (True, 0.75)
    assert not LookReport(
        engines=(look, EngineLook(endpoint="v", engine="e", version="A", digest="d")), seconds=1, pause_s=1
    ).equal
