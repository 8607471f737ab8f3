"""From the text of a request to token ids and back, by the model directory's tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ckpt_conformance.reference.config import ModelConfig
from ckpt_conformance.reference.requests import Event, Request
from ckpt_core.errors import ConfigError


class TextCodec:
    """Checks and encodes requests. Without a tokenizer.json only token ids are taken, and text is empty."""

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        self._config = config
        path = model_dir / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None

    def request(
        self,
        request_id: int,
        *,
        prompt: str | None,
        prompt_token_ids: Sequence[int] | None,
        max_tokens: int,
        ignore_eos: bool,
        emit: Callable[[Event], None],
    ) -> Request:
        """A checked request.

        Raises:
            ConfigError: no prompt or two, token ids out of range, or no room for a token.
        """
        if (prompt is None) == (prompt_token_ids is None):
            raise ConfigError("give exactly one of prompt and prompt_token_ids")
        ids = tuple(prompt_token_ids if prompt_token_ids is not None else self._encode(prompt or ""))
        vocab, limit = self._config.vocab_size, self._config.max_positions
        if not ids or not all(0 <= token < vocab for token in ids):
            raise ConfigError(f"expected at least one token, each from 0 to {vocab - 1}, got {list(ids)[:16]}")
        if max_tokens < 1 or len(ids) >= limit:
            raise ConfigError(
                f"got {len(ids)} prompt tokens and max_tokens {max_tokens}; expected max_tokens of 1 or more, "
                f"and a prompt shorter than the model's {limit} positions"
            )
        return Request(
            request_id=request_id,
            prompt=ids,
            max_tokens=min(max_tokens, limit - len(ids)),
            eos_token_ids=frozenset() if ignore_eos else self._config.eos_token_ids,
            emit=emit,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of output tokens, without special ones."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ConfigError("the model directory has no tokenizer.json; send prompt_token_ids")
        return list(self._tokenizer.encode(text).ids)
