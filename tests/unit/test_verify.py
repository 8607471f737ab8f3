"""Digests on arrival, whole or in parts; fingerprints that differ on any change of what is live."""

import pytest
import torch

from ckpt_core.contract import LiveState, LiveTensor
from ckpt_core.dtypes import DType
from ckpt_core.errors import VerificationError
from ckpt_core.manifest import TensorMeta, content_digest
from ckpt_core.verify import ArrivalDigest, fingerprint


def meta(data, name="t"):
    return TensorMeta(name=name, dtype=DType.U8, shape=(len(data),))


def expecting(*data):
    return ArrivalDigest([content_digest(bytes(each)) for each in data])


def part(data):
    return torch.tensor(list(data), dtype=torch.uint8)


DATA = bytes(range(200))


@pytest.mark.parametrize("cuts", [(), (1,), (199,), (50, 50, 100), tuple(range(1, 200))])
def test_a_tensor_may_come_in_parts(cuts):
    arrival = expecting(DATA)
    for start, stop in zip((0, *cuts), (*cuts, 200), strict=True):
        assert arrival.digested_bytes == 0
        arrival.add(0, meta(DATA), part(DATA[start:stop]))
    assert arrival.digested_bytes == 200


@pytest.mark.parametrize("place", [0, 99, 100, 199])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_wrong_bit_is_caught(place, bit):
    arrival, wrong = expecting(DATA), bytearray(DATA)
    wrong[place] ^= 1 << bit
    arrival.add(0, meta(DATA), part(wrong[:100]))
    with pytest.raises(VerificationError, match=r"tensor 't' arrived with digest [0-9a-f]{32}, expected [0-9a-f]{32}"):
        arrival.add(0, meta(DATA), part(wrong[100:]))


def test_parts_in_the_wrong_order_are_caught():
    arrival = expecting(DATA)
    arrival.add(0, meta(DATA), part(DATA[100:]))
    with pytest.raises(VerificationError):
        arrival.add(0, meta(DATA), part(DATA[:100]))


def test_tensors_may_come_between_each_others_parts():
    other = bytes(reversed(DATA))
    arrival = expecting(DATA, other)
    arrival.add(0, meta(DATA, "a"), part(DATA[:100]))
    arrival.add(1, meta(other, "b"), part(other))
    arrival.add(0, meta(DATA, "a"), part(DATA[100:]))
    assert arrival.digested_bytes == 400


def test_the_same_tensor_may_come_again():
    arrival = expecting(DATA)
    for _ in range(2):
        arrival.add(0, meta(DATA), part(DATA))
    assert arrival.digested_bytes == 400


def test_an_empty_tensor_is_complete_at_once():
    arrival = expecting(b"", b"x")
    arrival.add(0, meta(b""), part(b""))
    with pytest.raises(VerificationError):
        arrival.add(1, meta(b""), part(b""))


# -- fingerprints ------------------------------------------------------------------------------------------------
def live(**tensors):
    return {name: LiveTensor(tensor=tensor, state=LiveState.PURE) for name, tensor in tensors.items()}


def base():
    return {"a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.ones(4, dtype=torch.float32)}


CHANGES = {
    "bits": lambda t: t["a"].__setitem__((1, 2), 7),
    "last bit": lambda t: t["b"].view(torch.int32).__setitem__(3, t["b"].view(torch.int32)[3] ^ 1),
    "sign of zero": lambda t: t.update(b=-torch.zeros(4)),
    "name": lambda t: t.update(c=t.pop("a")),
    "dtype": lambda t: t.update(a=t["a"].view(torch.bfloat16)),
    "shape": lambda t: t.update(a=t["a"].reshape(3, 2)),
    "one dimension more": lambda t: t.update(a=t["a"].reshape(1, 2, 3)),
    "transposed": lambda t: t.update(a=t["a"].t().contiguous().reshape(2, 3)),
    "one more": lambda t: t.update(z=torch.empty(0)),
    "one less": lambda t: t.pop("b"),
    "swapped": lambda t: t.update(a=t["b"], b=t["a"]),
    "empty with a name that hides another": lambda t: t.update({"a\0": torch.empty(0)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_changes_the_fingerprint(change):
    tensors = base()
    CHANGES[change](tensors)
    assert fingerprint(live(**tensors)) != fingerprint(live(**base()))


def test_order_storage_and_state_do_not_matter():
    one, two = base(), base()
    two["a"] = two["a"].t().contiguous().t()  # other strides, same values
    two["b"] = torch.cat([torch.zeros(1), two["b"]])[1:]  # offset into a larger storage
    reversed_order = {
        name: LiveTensor(tensor=two[name], state=LiveState.PROCESSED) for name in sorted(two, reverse=True)
    }
    assert fingerprint(reversed_order) == fingerprint(live(**one))
    assert len(fingerprint(live(**one))) == 32


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0, 5),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(1, 3).expand(4, 3),
        torch.full((2,), float("nan")),
    ],
    ids=["scalar", "empty", "bool", "complex", "float8", "parameter", "expanded", "nan"],
)
def test_every_kind_of_tensor_has_one(tensor):
    assert fingerprint(live(t=tensor)) == fingerprint(live(t=tensor.detach().clone()))
    assert fingerprint(live(t=tensor)) != fingerprint(live(u=tensor))


def test_nothing_has_a_fingerprint_too():
    assert fingerprint({}) == fingerprint({})
