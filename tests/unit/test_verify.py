"""Fingerprints that differ on any change of what is live."""

import pytest
import torch

from ckpt_core.contract import LiveState, LiveTensor
from ckpt_core.verify import fingerprint


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
