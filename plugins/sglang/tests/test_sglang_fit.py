"""What a dry run of a loader says of a checkpoint: on models that load in the ways SGLang's do."""

import pytest
import torch
from torch import nn

from ckpt_core.dtypes import DType
from ckpt_core.errors import EngineStateError
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_sglang.dry_run import dry_run
from ckpt_sglang.fit import Shape, check_loadable, fit
from ckpt_sglang.held import Held

F32 = DType("F32")
WHOLE = Shape(tp_size=1, whole=True, model_path="/nowhere")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(4, 12, bias=False)
        self.norm = nn.Linear(1, 4, bias=False)


class Model(nn.Module):
    """Two layers with a fused projection; unknown names are passed over, as SGLang's Llama does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 8, bias=False)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
                if part in name:
                    target = parameters[name.replace(part, "qkv_proj")].data.narrow(0, 4 * number, 4)
                    assert target.shape == tensor.shape
                    target.copy_(tensor)
                    break
            else:
                if name in parameters:
                    parameters[name].data.copy_(tensor)


class Joining(nn.Module):
    """Two tensors are put together before they are copied; a third is changed in place."""

    def __init__(self):
        super().__init__()
        self.joined = nn.Linear(4, 8, bias=False)
        self.scaled = nn.Linear(4, 4, bias=False)

    def load_weights(self, weights):
        kept = {}
        for name, tensor in weights:
            if name == "scaled.weight":
                self.scaled.weight.data.copy_(tensor.add_(1.0))
                continue
            kept[name] = tensor
            if len(kept) == 2:
                self.joined.weight.data.copy_(torch.cat([kept["a.weight"], kept["b.weight"]]))


def made(kind=Model):
    with torch.device("meta"):
        return kind()


def shapes():
    layer = {"q_proj.weight": (4, 4), "k_proj.weight": (4, 4), "v_proj.weight": (4, 4), "norm.weight": (4, 1)}
    return {f"layers.{n}.{name}": shape for n in range(2) for name, shape in layer.items()} | {"head.weight": (8, 4)}


def manifest(given, dtype=F32):
    metas = (TensorMeta(name=name, dtype=dtype, shape=shape) for name, shape in sorted(given.items()))
    return Manifest(tensors=tuple(metas))


def layout(given, dtype=F32, shape=WHOLE):
    return fit(made(), made(), manifest(given, dtype), shape).layout


def test_a_checkpoint_that_fits():
    found = layout(shapes())
    assert [entry.tensor for entry in found.entries] == sorted(shapes())
    assert (found.missing, found.unknown, found.mismatched) == ((), (), ())
    groups = {entry.tensor: entry.group for entry in found.entries}
    assert groups["layers.0.q_proj.weight"] == groups["layers.0.v_proj.weight"] == "layers.0.qkv_proj"


@pytest.mark.parametrize("name", sorted(shapes()))
def test_each_missing_tensor_is_named(name):
    given = shapes()
    del given[name]
    assert layout(given).missing == (name,)


def test_a_part_that_no_layer_has_is_named_by_what_it_is_usually_called():
    given = {name: shape for name, shape in shapes().items() if "k_proj" not in name}
    assert layout(given).missing == ("layers.0.k_proj.weight", "layers.1.k_proj.weight")


def test_names_that_the_loader_passes_over_are_unknown():
    assert layout(shapes() | {"other.weight": (3,)}).unknown == ("other.weight",)


def test_names_are_not_called_unknown_where_other_ranks_may_have_their_parameters():
    split = Shape(tp_size=1, whole=False, model_path="/nowhere")
    found = layout(shapes() | {"other.weight": (3,)}, shape=split)
    assert found.unknown == ()
    assert "other.weight" not in {entry.tensor for entry in found.entries}


@pytest.mark.parametrize("wrong", [(9, 4), (1, 8, 4), (4, 8)])
def test_a_wrong_shape_is_named_with_what_was_got(wrong):
    (found,) = layout(shapes() | {"head.weight": wrong}).mismatched
    assert found.tensor == "head.weight"
    assert str(list(wrong)) in found.got


def test_the_tensors_after_one_that_stops_the_loader_are_looked_at_too():
    found = layout(shapes() | {"layers.0.q_proj.weight": (3, 4), "layers.1.norm.weight": (5, 1)})
    assert {"layers.0.q_proj.weight", "layers.1.norm.weight"} <= {item.tensor for item in found.mismatched}


def test_another_dtype_is_a_mismatch_though_a_copy_would_cast():
    assert {item.tensor for item in layout(shapes(), DType("F16")).mismatched} == set(shapes())


def test_what_the_loader_puts_together_must_come_together():
    given = {"a.weight": (4, 4), "b.weight": (4, 4), "scaled.weight": (4, 4)}
    found = fit(made(Joining), made(Joining), manifest(given), WHOLE)
    assert found.together["a.weight"] == {"a.weight", "b.weight"}
    assert found.clone == {"scaled.weight"}
    groups = {entry.tensor: entry.group for entry in found.layout.entries}
    assert groups["a.weight"] == groups["b.weight"]


def test_a_dry_run_writes_nothing():
    model = made()
    seen = dry_run(model, [(meta.name, meta.shape, meta.dtype) for meta in manifest(shapes()).tensors])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert seen.filled == {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_parameters_that_were_repacked_cannot_be_loaded_again():
    live = made()
    live.layers[1].qkv_proj.weight = nn.Parameter(torch.empty(4, 12, device="meta"))
    with pytest.raises(EngineStateError, match=r"layers\.1\.qkv_proj\.weight is float32 \[4, 12\]"):
        check_loadable(made(), live)


def test_repacked_parameters_are_no_hindrance_where_the_method_undoes_it():
    class Method:
        def restore_weights_before_loading(self, layer):
            """Undo it."""

    live = made()
    live.layers[1].qkv_proj.weight = nn.Parameter(torch.empty(4, 12, device="meta"))
    live.layers[1].qkv_proj.quant_method = Method()
    check_loadable(made(), live)


# -- tensors that wait for each other ----------------------------------------------------------------------------------
def test_tensors_that_need_no_others_go_at_once_and_as_they_are():
    tensor = torch.ones(2)
    (ready,) = Held({}, frozenset()).ready([("x", tensor)], frozenset({"x"}))
    assert ready[0][1] is tensor


def test_a_tensor_that_the_loader_writes_to_is_not_the_rings():
    tensor = torch.ones(2)
    (ready,) = Held({}, frozenset({"x"})).ready([("x", tensor)], frozenset({"x"}))
    ready[0][1].zero_()
    assert tensor.tolist() == [1.0, 1.0]


def test_a_group_over_two_buckets_is_kept_and_goes_whole():
    names = frozenset({"a", "b"})
    held = Held(dict.fromkeys(names, names), frozenset())
    first = torch.ones(2)
    assert list(held.ready([("a", first)], names)) == []
    assert held.retained_bytes == 8
    first.zero_()  # the ring goes on
    (ready,) = held.ready([("b", torch.zeros(2))], names)
    assert [name for name, _ in ready] == ["a", "b"]
    assert ready[0][1].tolist() == [1.0, 1.0]
    assert held.retained_bytes == 0


def test_a_group_does_not_wait_for_what_will_not_come():
    names = frozenset({"a", "b"})
    held = Held(dict.fromkeys(names, names), frozenset())
    assert len(list(held.ready([("a", torch.ones(2))], frozenset({"a"})))) == 1
