"""A draft model: one head that guesses the token after next, loaded with the model and checked by it.

Guesses change how many tokens one pass of the model yields, and never which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ckpt_conformance.reference.kv_cache import SequenceCache
from ckpt_conformance.reference.layers import LayerContext, ReplicatedLinear

if TYPE_CHECKING:
    from ckpt_conformance.reference.model import CausalLM


class DraftHead(nn.Module):
    """From the hidden state that gave the next token to one that the model's own head takes for the token after it."""

    def __init__(self, context: LayerContext, hidden: int) -> None:
        super().__init__()
        self.proj = ReplicatedLinear(context, "proj", hidden, hidden)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, hidden] to [n, hidden]."""
        return rows + nn.functional.silu(self.proj(rows))


def next_token(model: CausalLM, token_ids: torch.Tensor, sequence: SequenceCache) -> int:
    """The greedy token behind these, computed here, or already where the last guess held."""
    if sequence.ahead is not None:
        ahead, sequence.ahead = sequence.ahead, None
        return ahead
    if model.draft is None:
        return int(model.next_logits(token_ids, sequence).argmax())
    return _checked(model, model.draft, token_ids, sequence)


def _checked(model: CausalLM, draft: DraftHead, token_ids: torch.Tensor, sequence: SequenceCache) -> int:
    """Compute with the last guess behind the tokens; where it is what comes next, the token behind it is known, too."""
    guess = sequence.guess if sequence.length + 2 <= model.config.max_positions else None
    if guess is not None:
        token_ids = torch.cat([token_ids, token_ids.new_tensor([guess])])
    hidden = model.model(token_ids, sequence)[-1 if guess is None else -2 :]
    token, *behind = (int(row.argmax()) for row in model.logits(hidden))
    if guess == token:
        (sequence.ahead,) = behind
    elif guess is not None:
        sequence.retreat()
        hidden = hidden[:1]
    sequence.guess = int(model.logits(draft(hidden[-1:]))[0].argmax())
    return token
