"""Small random checkpoints in Hugging Face layout: safetensors, config.json and a word-level tokenizer.json.

Head counts and sizes are divisible by 6, so that tensor parallel degrees 1, 2 and 3 all work.
Needs no transformers.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ckpt_core.errors import ConfigError

Arch = Literal["llama", "qwen3", "qwen3_moe"]

EOS_TOKEN_ID = 1
INDEX_NAME = "model.safetensors.index.json"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Sizes of a generated model; the names are those of config.json where it has them."""

    arch: Arch
    tied: bool
    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int
    moe_intermediate: int
    scalars: bool
    draft: bool

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (the Qwen3 family)."""
        return self.arch != "llama"


def make_tiny(
    directory: Path | str,
    arch: Arch = "llama",
    seed: int = 0,
    *,
    tied: bool = False,
    vocab: int = 100,
    dtype: str = "bfloat16",
    layers: int = 2,
    hidden: int = 96,
    heads: int = 12,
    kv_heads: int = 6,
    head_dim: int = 8,
    intermediate: int = 192,
    experts: int = 8,
    moe_intermediate: int = 48,
    scalars: bool = False,
    draft: bool = False,
    files: int = 1,
) -> Path:
    """Write a random checkpoint into `directory` and return it.

    The same arguments give the same bits. Weights are scaled so that greedy output is varied.

    Args:
        directory: made where it does not exist.
        arch: which family.
        seed: of every value.
        tied: the head is the embedding; no lm_head.weight is written.
        dtype: "bfloat16" or "float32".
        scalars: with a tensor without dimensions and one without elements; for the reference engine.
        draft: with a draft model; for the reference engine.
        files: number of safetensors files; with more than one an index is written.

    Raises:
        ConfigError: unknown arch or dtype, or fewer than one file.
    """
    if arch not in _ARCHITECTURES or dtype not in ("bfloat16", "float32") or files < 1:
        raise ConfigError(
            f"make_tiny: got arch={arch!r}, dtype={dtype!r}, files={files}; expected arch of "
            f"{sorted(_ARCHITECTURES)}, dtype bfloat16 or float32, at least one file"
        )
    shape = TinyShape(
        arch=arch,
        tied=tied,
        vocab=vocab,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        experts=experts,
        moe_intermediate=moe_intermediate,
        scalars=scalars,
        draft=draft,
    )
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: _random(name, size, seed, getattr(torch, dtype)) for name, size in tensor_shapes(shape).items()}
    write_tensors(out, tensors, files=files)
    (out / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2))
    _write_tokenizer(out, vocab)
    return out


def perturb(directory: Path | str, out: Path | str, seed: int = 1, *, names: str = "") -> Path:
    """Write a second version of a checkpoint: the same names and shapes, other values.

    Args:
        directory: the first version.
        out: where the second goes.
        seed: of the change.
        names: only tensors whose name contains this are changed; empty for all.

    Raises:
        ConfigError: no tensor's name contains `names`.
    """
    source, target = Path(directory), Path(out)
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(_read_tensors(source))
    chosen = [name for name in tensors if names in name]
    if not chosen:
        raise ConfigError(f"perturb: no tensor of {source} has {names!r} in its name")
    for name in chosen:
        tensors[name] = _random(name, tuple(tensors[name].shape), seed, tensors[name].dtype)
    write_tensors(target, tensors, files=len(list(source.glob("*.safetensors"))))
    for extra in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / extra).exists():
            shutil.copyfile(source / extra, target / extra)
    return target


def tensor_shapes(shape: TinyShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, in model order."""
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        sizes.update((f"model.layers.{layer}.{name}", size) for name, size in _layer_shapes(shape))
    sizes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocab, shape.hidden)
    if shape.draft:
        sizes["draft.proj.weight"] = (shape.hidden, shape.hidden)
    if shape.scalars:
        sizes |= {"logit_scale.weight": (), "logit_scale.g_idx": (0,)}
    return sizes


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], *, files: int = 1) -> None:
    """Write tensors as one model.safetensors, or dealt over several files with an index."""
    if files == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return
    weight_map = {}
    for part in range(files):
        file_name = f"model-{part + 1:05d}-of-{files:05d}.safetensors"
        held = {name: tensors[name] for name in list(tensors)[part::files]}
        save_file(held, directory / file_name)
        weight_map.update(dict.fromkeys(held, file_name))
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2))


def _layer_shapes(shape: TinyShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "input_layernorm.weight", (shape.hidden,)
    yield "self_attn.q_proj.weight", (queries, shape.hidden)
    yield "self_attn.k_proj.weight", (keys, shape.hidden)
    yield "self_attn.v_proj.weight", (keys, shape.hidden)
    yield "self_attn.o_proj.weight", (shape.hidden, queries)
    if shape.qk_norm:
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)
    yield "post_attention_layernorm.weight", (shape.hidden,)
    if shape.arch != "qwen3_moe":
        yield from _mlp_shapes("mlp", shape.hidden, shape.intermediate)
        return
    yield "mlp.gate.weight", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        yield from _mlp_shapes(f"mlp.experts.{expert}", shape.hidden, shape.moe_intermediate)


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _random(name: str, size: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    # torch's CPU generator takes 32 bits of a seed: the name and the number must both be in them
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.empty(size, dtype=torch.float32).normal_(generator=generator)
    if len(size) <= 1:
        return (1 + 0.1 * values).to(dtype)
    scale = 0.3 if "embed_tokens" in name else 1.5 / math.sqrt(size[-1])
    return values.mul_(scale).to(dtype)


def _config(shape: TinyShape, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[shape.arch]],
        "model_type": shape.arch,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        **({"scaled_logits": True} if shape.scalars else {}),
        **({"draft_head": True} if shape.draft else {}),
        "torch_dtype": dtype,
    }
    if shape.arch == "qwen3_moe":
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": shape.moe_intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _write_tokenizer(directory: Path, vocab: int) -> None:
    words = {"<unk>": 0, "<eos>": EOS_TOKEN_ID} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    # engines do not take a tokenizer.json without its class
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))


def _read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                yield name, file.get_tensor(name)
