"""Names, shapes and dtypes of a checkpoint against what a model wants, without vLLM."""

import pytest

from ckpt_core.dtypes import DType
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_vllm.expected import ExpectedCheckpoint, ExpectedTensor
from ckpt_vllm.layout import fits, layout_like, layout_of, started_from

QKV, HEAD = "model.layers.0.self_attn.qkv_proj", "lm_head"
WANTED = {
    **{
        f"model.layers.0.self_attn.{part}.weight": ExpectedTensor(group=QKV, shape=(4, 8), dtype="bfloat16")
        for part in ("q_proj", "k_proj", "v_proj")
    },
    "lm_head.weight": ExpectedTensor(group=HEAD, shape=(16, 8), dtype="bfloat16"),
    "scale": ExpectedTensor(group=HEAD, shape=None, dtype=None, required=False),
    "experts.0.up_proj.weight": ExpectedTensor(group="experts", shape=None, dtype=None),
    "experts.1.up_proj.weight": ExpectedTensor(group="experts", shape=None, dtype=None),
}
EXPECTED = ExpectedCheckpoint(
    tensors=WANTED, aliases=frozenset({"tied.weight"}), fused_experts={"experts.gate_up_proj": "experts"}
)


def manifest(**changes):
    shapes = {name: wanted.shape or (2, 2) for name, wanted in WANTED.items() if name != "scale"}
    shapes |= changes
    return Manifest(
        tensors=tuple(
            TensorMeta(
                name=name,
                dtype=DType.BF16 if shape != "fp16" else DType.F16,
                shape=(4, 8) if shape == "fp16" else shape,
            )
            for name, shape in sorted(shapes.items())
            if shape is not None
        )
    )


def layout(given, rename=str, elsewhere=lambda name: False):
    return layout_of(given, EXPECTED, rename, elsewhere)


def test_what_fits_has_no_problem_and_is_grouped_by_module():
    found = layout(manifest())
    assert (found.missing, found.unknown, found.mismatched) == ((), (), ())
    assert {entry.group for entry in found.entries if "self_attn" in entry.tensor} == {QKV}


def test_missing_is_told_and_optional_is_not():
    found = layout(manifest(**{"lm_head.weight": None}))
    assert found.missing == ("lm_head.weight",)


def test_unknown_is_told_but_not_that_of_another_stage():
    given = manifest(stranger=(1,))
    assert layout(given).unknown == ("stranger",)
    assert layout(given, elsewhere=lambda name: name == "stranger").unknown == ()


@pytest.mark.parametrize("wrong", [(5, 8), (1, 4, 8), "fp16"])
def test_a_misfit_says_what_was_expected(wrong):
    name = "model.layers.0.self_attn.k_proj.weight"
    (found,) = layout(manifest(**{name: wrong})).mismatched
    assert found.tensor == name
    assert found.expected == "bfloat16 [4, 8]"


def test_tied_and_dropped_names_are_not_sent():
    given = manifest(**{"tied.weight": (16, 8), "model.rotary_emb.inv_freq": (4,), "gone": (1,)})
    found = layout(given, rename=lambda name: None if name == "gone" else name)
    assert found.unknown == ()
    assert {"tied.weight", "model.rotary_emb.inv_freq", "gone"}.isdisjoint(entry.tensor for entry in found.entries)


def test_fused_experts_may_come_instead_of_single_ones():
    given = manifest(
        **{"experts.0.up_proj.weight": None, "experts.1.up_proj.weight": None, "experts.gate_up_proj": (2, 2, 2)}
    )
    assert layout(given).missing == ()


def test_renamed_tensors_are_asked_for_by_the_checkpoints_name():
    given = Manifest(
        tensors=tuple(
            TensorMeta(name=f"language.{meta.name}", dtype=meta.dtype, shape=meta.shape) for meta in manifest().tensors
        )
    )
    found = layout(given, rename=lambda name: name.removeprefix("language."))
    assert (found.missing, found.unknown) == ((), ())
    assert all(entry.tensor.startswith("language.") for entry in found.entries)


def test_what_fits_is_known_by_its_layout():
    assert fits(layout(manifest()))
    for change in ({"lm_head.weight": None}, {"stranger": (1,)}, {"lm_head.weight": (16, 9)}):
        assert not fits(layout(manifest(**change)))


def test_a_checkpoint_like_the_first_files_fits_them():
    started = manifest()
    assert fits(found := layout_like(started, started, aliases=()))
    assert len(found.entries) == len(started.tensors)


def test_differences_from_the_first_files_are_told():
    given = manifest(**{"lm_head.weight": None, "stranger": (1,), "model.layers.0.self_attn.k_proj.weight": "fp16"})
    found = layout_like(given, manifest(), aliases=())
    assert (found.missing, found.unknown) == (("lm_head.weight",), ("stranger",))
    (misfit,) = found.mismatched
    assert (misfit.expected, misfit.got) == ("bfloat16 [4, 8]", "float16 [4, 8]")
    assert "stranger" not in {entry.tensor for entry in found.entries}


@pytest.mark.parametrize("spare", ["tied.weight", "model.rotary_emb.inv_freq"])
def test_spare_tensors_may_come_and_go(spare):
    plain, more = manifest(), manifest(**{spare: (16, 8)})
    for given, started in ((plain, more), (more, plain)):
        found = layout_like(given, started, aliases={"tied.weight"})
        assert fits(found)
        assert spare not in {entry.tensor for entry in found.entries}


def test_without_files_there_is_nothing_to_compare_with(tmp_path):
    assert started_from("org/model-on-a-hub") is None
    assert started_from(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    assert started_from(str(tmp_path)) is None
