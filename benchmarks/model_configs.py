"""Tiny random models of many kinds, as transformers makes and saves them: with the tensor names that real checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ODD_VOCAB = 515  # no multiple of any TP size
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama(*, tied: bool, vocab: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_SIZES, head_dim=32, vocab_size=vocab, tie_word_embeddings=tied)


def _gemma() -> PretrainedConfig:
    from transformers import GemmaConfig

    return GemmaConfig(**_SIZES, head_dim=32, vocab_size=512, hidden_activation="gelu_pytorch_tanh")


def _qwen3_moe() -> PretrainedConfig:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return Qwen3MoeConfig(
        **_SIZES, **experts, head_dim=32, vocab_size=512, mlp_only_layers=[], tie_word_embeddings=False
    )


def _mixtral() -> PretrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, vocab_size=512, head_dim=32)


def _gpt2() -> PretrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=512, vocab_size=512, bos_token_id=1, eos_token_id=2)


def _phi3() -> PretrainedConfig:
    from transformers import Phi3Config

    return Phi3Config(**_SIZES, vocab_size=512, original_max_position_embeddings=512)


_LATENT = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "vocab_size": 512,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
}


def _deepseek_v2() -> PretrainedConfig:
    from transformers import DeepseekV2Config

    sizes = {**_SIZES, "num_key_value_heads": 4}
    return DeepseekV2Config(
        **sizes,
        **_LATENT,
        q_lora_rank=None,
        topk_method="greedy",
        scoring_func="softmax",
        architectures=["DeepseekV2ForCausalLM"],
    )


def _deepseek_v3() -> PretrainedConfig:
    from transformers import DeepseekV3Config

    sizes = {**_SIZES, "num_key_value_heads": 4}
    # engines ask for the two last ones, which real config.json files have, and transformers' class no longer knows
    return DeepseekV3Config(
        **sizes, **_LATENT, q_lora_rank=64, num_nextn_predict_layers=0, topk_method="noaux_tc", scoring_func="sigmoid"
    )


CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _llama(tied=False, vocab=512),
    "llama tied": lambda: _llama(tied=True, vocab=512),
    "llama odd vocabulary": lambda: _llama(tied=False, vocab=ODD_VOCAB),
    "gemma": _gemma,
    "qwen3 moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "phi3": _phi3,
    "deepseek v2": _deepseek_v2,
    "deepseek v3": _deepseek_v3,
}


def write_model(directory: Path, kind: str) -> None:
    """Config, tokenizer of words and random BF16 weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm_shapes import write_tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    write_tokenizer(directory, vocab=512)
