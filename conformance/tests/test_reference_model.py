"""The model against transformers, and its loaders against plain slicing."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_conformance.models.tiny import Arch, make_tiny, perturb
from ckpt_conformance.reference.checkpoint import read_tensors
from ckpt_conformance.reference.config import read_config
from ckpt_conformance.reference.messages import StepItem
from ckpt_conformance.reference.options import WorkerOptions
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_conformance.reference.worker import Worker
from ckpt_core.errors import ConfigError, CoverageError, ManifestError

PROMPT = [5, 17, 33, 2, 90, 8, 44, 61, 12]
ARCHS: tuple[Arch, ...] = ("llama", "qwen3", "qwen3_moe")


def transformers_model(directory: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_and_greedy_output_are_those_of_transformers(tmp_path: Path, arch: Arch, tied: bool, dtype: str) -> None:
    directory = make_tiny(tmp_path, arch, 3, tied=tied, dtype=dtype)
    worker, peer = Worker(directory), transformers_model(directory, dtype)
    with torch.no_grad():
        expected = peer(torch.tensor([PROMPT])).logits[0].float()
        output = peer.generate(
            torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0, use_cache=True
        )
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    torch.testing.assert_close(worker.logits(PROMPT), expected, atol=tolerance, rtol=tolerance)
    assert worker.generate(PROMPT, 24) == output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["guesses that hold now and then", "random guesses"])
def test_a_draft_model_changes_how_tokens_are_computed_and_not_which(tmp_path: Path, scale: float) -> None:
    worker = Worker(make_tiny(tmp_path, "qwen3", 3, dtype="float32", vocab=8, draft=True))
    draft, calls = worker.model.draft, list[int]()
    assert draft is not None
    draft.proj.tensor("weight").data.mul_(scale)
    worker.model.model.register_forward_hook(lambda _module, arguments, _out: calls.append(len(arguments[0])))
    drafted = _stepped(worker, 40)
    assert set(calls[1:]) == {2}
    passes = len(calls)
    assert _stepped(worker, 40, forget=True) == drafted
    calls.clear()
    worker.model.draft = None
    assert _stepped(worker, 40) == drafted
    assert passes < 40 == len(calls), "no guess held"


def _stepped(worker: Worker, count: int, *, forget: bool = False) -> list[int]:
    """Greedy tokens, an end token or not; where asked, as after an update between any two."""
    tokens = worker.step([StepItem(sequence_id=1, token_ids=[5, 2, 7, 3], prefill=True)])
    while len(tokens) < count:
        if forget:
            worker.kv.forget_ahead()
        tokens += worker.step([StepItem(sequence_id=1, token_ids=tokens[-1:])])
    worker.kv.free([1])
    return tokens


def test_output_depends_on_the_weights(tmp_path: Path) -> None:
    first = make_tiny(tmp_path / "a", "qwen3", 3)
    second = perturb(first, tmp_path / "b", 4)
    assert Worker(first).generate(PROMPT, 12) != Worker(second).generate(PROMPT, 12)


def test_sharded_files_hold_the_same_model(tmp_path: Path) -> None:
    whole = make_tiny(tmp_path / "one", "llama", 5)
    split = make_tiny(tmp_path / "many", "llama", 5, files=3)
    assert len(list(split.glob("*.safetensors"))) == 3
    assert Worker(whole).generate(PROMPT, 8) == Worker(split).generate(PROMPT, 8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_all_ranks_make_up_the_checkpoint(tmp_path: Path, arch: Arch, size: int) -> None:
    directory = make_tiny(tmp_path, arch, 7)
    checkpoint = dict(read_tensors(directory))
    ranks = [Worker(directory, group=TpGroup(rank=rank, size=size)).model.live_tensors() for rank in range(size)]
    attention = "model.layers.1.self_attn"
    parts = [rank[f"{attention}.qkv_proj.weight"].split([96 // size, 48 // size, 48 // size]) for rank in ranks]
    for index, name in enumerate("qkv"):
        together = torch.cat([part[index] for part in parts])
        assert torch.equal(together, checkpoint[f"{attention}.{name}_proj.weight"])
    columns = torch.cat([rank[f"{attention}.o_proj.weight"] for rank in ranks], dim=1)
    assert torch.equal(columns, checkpoint[f"{attention}.o_proj.weight"])
    if arch == "qwen3_moe":
        experts = "model.layers.1.mlp.experts"
        up = torch.cat([rank[f"{experts}.w13"][5].chunk(2)[1] for rank in ranks])
        down = torch.cat([rank[f"{experts}.w2"][5] for rank in ranks], dim=1)
        assert torch.equal(up, checkpoint[f"{experts}.5.up_proj.weight"])
        assert torch.equal(down, checkpoint[f"{experts}.5.down_proj.weight"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_vocabulary_is_padded_with_zero_rows(tmp_path: Path, size: int) -> None:
    directory = make_tiny(tmp_path, "llama", 7, vocab=100)
    embedding = dict(read_tensors(directory))["model.embed_tokens.weight"]
    workers = [Worker(directory, group=TpGroup(rank=rank, size=size)) for rank in range(size)]
    for worker in workers:  # a reload must write the padding again, whatever is in it
        live = worker.model.live_tensors()["model.embed_tokens.weight"]
        live.fill_(float("nan"))
        worker.model.load_weights([("model.embed_tokens.weight", embedding)])
    rows = torch.cat([worker.model.live_tensors()["model.embed_tokens.weight"] for worker in workers])
    assert rows.shape[0] % (64 * size) == 0
    assert torch.equal(rows[:100], embedding)
    assert not rows[100:].any()


def test_kv_heads_fewer_than_ranks_are_replicated(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "llama", 7, heads=6, kv_heads=2, head_dim=16, intermediate=192)
    keys = dict(read_tensors(directory))["model.layers.0.self_attn.k_proj.weight"].split(16)
    for rank in range(6):
        worker = Worker(directory, group=TpGroup(rank=rank, size=6))
        fused = worker.model.live_tensors()["model.layers.0.self_attn.qkv_proj.weight"]
        assert torch.equal(fused[16:32], keys[rank // 3])


def test_loader_keeps_no_reference(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "qwen3_moe", 7)
    model = Worker(directory).model
    watched = []
    for name, tensor in read_tensors(directory):
        watched.append(weakref.ref(tensor))
        model.load_weights([(name, tensor)])
        tensor.fill_(float("nan"))
        del tensor
    gc.collect()
    assert not [reference for reference in watched if reference() is not None]
    assert not [name for name, live in model.live_tensors().items() if live.isnan().any()]


def test_weight_loader_is_attached_to_the_parameter(tmp_path: Path) -> None:
    worker = Worker(make_tiny(tmp_path, "llama", 7), WorkerOptions(load_format="dummy"))
    parameter = dict(worker.model.named_parameters())["model.layers.0.mlp.gate_up_proj.weight"]
    loaded = torch.full((192, 96), 3.0, dtype=torch.bfloat16)
    parameter.weight_loader(parameter.data, loaded, ("up_proj",))
    assert (parameter[192:] == 3.0).all()
    assert not (parameter[:192] == 3.0).any()


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("model.layers.9.self_attn.q_proj.weight", torch.zeros(96, 96, dtype=torch.bfloat16), "not known"),
        ("model.norm.weight", torch.zeros(95, dtype=torch.bfloat16), r"expected BF16 \[96\], got BF16 \[95\]"),
        ("model.norm.weight", torch.zeros(96), r"expected BF16 \[96\], got F32 \[96\]"),
    ],
)
def test_load_weights_refuses_what_does_not_fit(tmp_path: Path, name: str, tensor: torch.Tensor, expected: str) -> None:
    model = Worker(make_tiny(tmp_path, "llama", 7)).model
    before = {key: live.clone() for key, live in model.live_tensors().items()}
    with pytest.raises(CoverageError, match=expected) as caught:
        model.load_weights([(name, tensor)])
    assert name in str(caught.value)
    assert all(torch.equal(before[key], live) for key, live in model.live_tensors().items())


def test_start_refuses_an_incomplete_checkpoint(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "llama", 7, tied=True)
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoverageError, match=r"lacks 1 tensors.*lm_head\.weight"):
        Worker(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ManifestError, match="no safetensors files"):
        Worker(directory)


def test_dummy_weights_need_no_file_and_repeat(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "qwen3_moe", 7)
    (directory / "model.safetensors").unlink()
    options = [WorkerOptions(load_format="dummy", seed=seed) for seed in (1, 1, 2)]
    outputs = [Worker(directory, option).generate(PROMPT, 8) for option in options]
    assert outputs[0] == outputs[1] != outputs[2]


def _edit(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | changes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit(architectures=["GPT2LMHeadModel"]), "architecture 'GPT2LMHeadModel' is not supported"),
        (_edit(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope type 'llama3'"),
        (_edit(rope_parameters={"rope_type": "yarn"}), "rope type 'yarn'"),
        (_edit(hidden_act="gelu"), "hidden_act"),
        (_edit(torch_dtype="float16"), "dtype 'float16'"),
        (_edit(hidden_size="many"), "wrong type"),
        (lambda config: {k: v for k, v in config.items() if k != "hidden_size"}, "has no 'hidden_size'"),
    ],
)
def test_config_errors_are_clear(
    tmp_path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    directory = make_tiny(tmp_path, "llama", 1)
    path = directory / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=message):
        read_config(directory)


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama", 1) / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"rope_theta": 5e5}))
    assert read_config(tmp_path).rope_theta == 5e5
    del raw["rope_theta"]
    path.write_text(json.dumps(raw | {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}))
    assert read_config(tmp_path).rope_theta == 7e5


@pytest.mark.parametrize(("tp", "name"), [(5, "num_attention_heads"), (4, "num_key_value_heads"), (0, "degree 0")])
def test_tp_that_does_not_divide_is_refused(tmp_path: Path, tp: int, name: str) -> None:
    config = read_config(make_tiny(tmp_path, "llama", 1))
    with pytest.raises(ConfigError, match=name):
        config.check_tp(tp)
