"""Keys and values of running sequences, and a prefix cache that later requests with the same beginning reuse.

The prefix cache knows nothing of weights: after an update it is stale until somebody flushes it, as in real
engines.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Sizes of one token's keys and values on this rank."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, tokens: int) -> torch.Tensor:
        """Storage for keys and values: [2, layers, kv_heads, tokens, head_dim]."""
        return torch.empty((2, self.layers, self.kv_heads, tokens, self.head_dim), dtype=self.dtype, device=self.device)


class SequenceCache:
    """Keys and values of one sequence. `length` tokens are valid in every layer.

    Attributes:
        guess: what a draft model takes for the token after next; see `draft`.
        ahead: the token after the last one, whose keys and values are here already; None where they are not.
    """

    def __init__(self, shape: CacheShape, capacity: int = 64) -> None:
        self.shape = shape
        self.length = 0
        self.guess: int | None = None
        self.ahead: int | None = None
        self._data = shape.empty(capacity)

    def reserve(self, tokens: int) -> None:
        """Make room for that many more tokens."""
        wanted = self.length + tokens
        if wanted > self._data.shape[3]:
            grown = self.shape.empty(max(wanted, 2 * self._data.shape[3]))
            grown[:, :, :, : self.length] = self._data[:, :, :, : self.length]
            self._data = grown

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a layer's new keys and values [kv_heads, t, head_dim] behind the valid ones; return all."""
        end = self.length + keys.shape[1]
        self._data[0, layer, :, self.length : end] = keys
        self._data[1, layer, :, self.length : end] = values
        return self._data[0, layer, :, :end], self._data[1, layer, :, :end]

    def advance(self, tokens: int) -> None:
        """All layers have written that many tokens."""
        self.length += tokens

    def retreat(self) -> None:
        """The last token is not valid."""
        self.length -= 1

    def forget_ahead(self) -> None:
        """What was computed ahead of the last token came from other weights."""
        if self.ahead is not None:
            self.retreat()
        self.guess = self.ahead = None

    def append_block(self, block: torch.Tensor) -> None:
        """Take over a cached block [2, layers, kv_heads, t, head_dim]."""
        tokens = block.shape[3]
        self.reserve(tokens)
        self._data[:, :, :, self.length : self.length + tokens] = block
        self.advance(tokens)

    def block(self, index: int) -> torch.Tensor:
        """A copy of the index-th block of BLOCK_TOKENS tokens."""
        start = index * BLOCK_TOKENS
        return self._data[:, :, :, start : start + BLOCK_TOKENS].clone()


class PrefixCache:
    """Blocks of prompts by the chained hash of all tokens up to their end; the least recently used go."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, token_ids: Sequence[int]) -> list[torch.Tensor]:
        """Blocks of the longest cached prefix that leaves at least one token to compute."""
        found = []
        for key in block_keys(token_ids[: len(token_ids) - 1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        return found

    def store(self, token_ids: Sequence[int], sequence: SequenceCache) -> None:
        """Keep the whole blocks of a computed prompt."""
        for index, key in enumerate(block_keys(token_ids)):
            if key not in self._blocks:
                self._blocks[key] = sequence.block(index)
            self._blocks.move_to_end(key)
        while len(self._blocks) > self.capacity_blocks:
            self._blocks.popitem(last=False)

    def flush(self) -> None:
        """Forget everything."""
        self._blocks.clear()


def block_keys(token_ids: Sequence[int]) -> Iterator[bytes]:
    """A key for each whole block, which depends on all tokens before it."""
    parent = b""
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        text = ",".join(map(str, token_ids[start : start + BLOCK_TOKENS]))
        parent = hashlib.blake2b(parent + text.encode(), digest_size=16).digest()
        yield parent


class KvCache:
    """All key and value memory of a rank."""

    def __init__(self, shape: CacheShape, *, prefix_blocks: int) -> None:
        self.shape = shape
        self.prefix = PrefixCache(prefix_blocks)
        self.sequences: dict[int, SequenceCache] = {}

    def start(self, sequence_id: int, token_ids: Sequence[int]) -> SequenceCache:
        """A new sequence, which begins with what the prefix cache has of it."""
        sequence = SequenceCache(self.shape)
        for block in self.prefix.match(token_ids):
            sequence.append_block(block)
        self.sequences[sequence_id] = sequence
        return sequence

    def free(self, sequence_ids: Sequence[int]) -> None:
        """Drop sequences; unknown ones are no error, since an abort may come twice."""
        for sequence_id in sequence_ids:
            self.sequences.pop(sequence_id, None)

    def forget_ahead(self) -> None:
        """No token that is still to be told comes from the weights until now."""
        for sequence in self.sequences.values():
            sequence.forget_ahead()

    def flush(self) -> None:
        """Drop the prefix cache. Running sequences keep their own copies."""
        self.prefix.flush()

    def clear(self) -> None:
        """Drop everything (sleep)."""
        self.prefix.flush()
        self.sequences.clear()
