"""Checkpoints for a real vLLM: shapes with the norms of Qwen3, and a config and tokenizer to start a server on."""

from __future__ import annotations

from pathlib import Path

from shapes import DECODERS, REPLICATED, Decoder, Shape


def shapes_of(model: str, layers: int) -> list[Shape]:
    """All tensors of a dense Qwen3."""
    decoder = DECODERS[model]
    norms = [
        Shape(name=f"model.layers.{layer}.self_attn.{kind}_norm.weight", shape=(decoder.head_dim,), dim=REPLICATED)
        for layer in range(layers)
        for kind in "qk"
    ]
    return [*decoder.tensors(layers), *norms]


def write_model(directory: Path, model: str, layers: int) -> None:
    """config.json and a tokenizer of words, no weights."""
    config_of(DECODERS[model], layers).save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path, vocab: int = 1000) -> None:
    """Words w4, w5, ... by their number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
    ).save_pretrained(directory)


def config_of(decoder: Decoder, layers: int) -> object:
    """The configuration that transformers and vLLM read."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=decoder.vocab,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
        bos_token_id=1,
        eos_token_id=2,
    )
