"""The model part of the engine's configuration, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_core.dtypes import DType
from ckpt_core.errors import ConfigError

DTYPES = {"bfloat16": DType.BF16, "float32": DType.F32}
_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: which layers have it, and its sizes."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalise_top_k: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """All that the model needs to know to be built. Sizes are those of the whole model, before sharding.

    Attributes:
        scaled_logits: logits are multiplied by a scalar of the checkpoint; this engine's own extension.
        draft_head: the checkpoint has a draft model; so is this.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qk_norm: bool
    attention_bias: bool
    scaled_logits: bool
    draft_head: bool
    dtype: DType
    eos_token_ids: frozenset[int]
    moe: MoeConfig | None = None

    def check_tp(self, tp_size: int) -> None:
        """Refuse a tensor parallel degree that does not divide the model.

        Raises:
            ConfigError: names the size that is not divisible.
        """
        if tp_size < 1:
            raise ConfigError(f"tensor parallel degree {tp_size}: expected 1 or more")
        sizes = {"num_attention_heads": self.num_heads, "intermediate_size": self.intermediate_size}
        if self.moe is not None:
            sizes["moe_intermediate_size"] = self.moe.intermediate_size
        for name, size in sizes.items():
            if size % tp_size:
                raise ConfigError(f"{name} = {size} is not divisible by --tp {tp_size}; choose a divisor of it")
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads = {self.num_kv_heads} and --tp {tp_size}: one must divide the other; "
                "choose another degree"
            )


def read_config(model_dir: Path | str, *, dtype: str = "auto") -> ModelConfig:
    """Read config.json (and the end tokens of generation_config.json) of a model directory.

    Args:
        model_dir: directory of the model.
        dtype: "auto" takes the checkpoint's, else "bfloat16" or "float32".

    Raises:
        ConfigError: no such file, not JSON, a missing key, or a model this engine does not run.
    """
    directory = Path(model_dir)
    raw = _read_json(directory / "config.json")
    try:
        return _parse(raw, dtype=dtype, eos_token_ids=_eos_token_ids(raw, directory))
    except KeyError as error:
        raise ConfigError(
            f"{directory / 'config.json'} has no {error}, which a {raw.get('model_type')} needs"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{directory / 'config.json'} has a value of the wrong type: {error}") from error


def _parse(raw: Mapping[str, Any], *, dtype: str, eos_token_ids: frozenset[int]) -> ModelConfig:
    architecture = _architecture(raw)
    qwen = architecture != "LlamaForCausalLM"
    _refuse_unsupported(raw)
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or (128 if qwen else hidden // heads)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(raw),
        max_positions=int(raw.get("max_position_embeddings", 2048)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=qwen,
        attention_bias=bool(raw.get("attention_bias", False)),
        scaled_logits=bool(raw.get("scaled_logits", False)),
        draft_head=bool(raw.get("draft_head", False)),
        dtype=_dtype(raw, dtype),
        eos_token_ids=eos_token_ids,
        moe=_moe(raw) if architecture == "Qwen3MoeForCausalLM" else None,
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures") or ["none"]
    if named[0] not in _ARCHITECTURES:
        raise ConfigError(f"architecture {named[0]!r} is not supported; expected one of {', '.join(_ARCHITECTURES)}")
    return str(named[0])


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "pretraining_tp": (1, None),
    }
    for key, accepted in wanted.items():
        if key in raw and raw[key] not in accepted:
            raise ConfigError(f"config.json: {key} = {raw[key]!r} is not supported; expected {accepted[0]!r}")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """Both spellings: `rope_theta` with `rope_scaling`, and `rope_parameters` of transformers 5."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope type {kind!r} is not supported; expected 'default' (no scaling of positions)")
    if float(raw.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1.0 is not supported")
    return float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)


def _moe(raw: Mapping[str, Any]) -> MoeConfig:
    step = int(raw.get("decoder_sparse_step", 1))
    dense = set(raw.get("mlp_only_layers") or ())
    layers = range(int(raw["num_hidden_layers"]))
    return MoeConfig(
        num_experts=int(raw["num_experts"]),
        top_k=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["moe_intermediate_size"]),
        normalise_top_k=bool(raw.get("norm_topk_prob", False)),
        sparse_layers=frozenset(i for i in layers if i not in dense and (i + 1) % step == 0),
    )


def _dtype(raw: Mapping[str, Any], wanted: str) -> DType:
    name = wanted if wanted != "auto" else str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; expected {' or '.join(DTYPES)} (see --dtype)")
    return DTYPES[name]


def _eos_token_ids(raw: Mapping[str, Any], directory: Path) -> frozenset[int]:
    found: set[int] = set()
    generation = directory / "generation_config.json"
    for config in (raw, _read_json(generation) if generation.exists() else {}):
        value = config.get("eos_token_id")
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    return frozenset(int(token) for token in found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected a Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
