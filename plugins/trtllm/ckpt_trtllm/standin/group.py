"""Tensor parallel ranks that are threads of one process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ckpt_conformance.reference.parallel import TpGroup

_TIMEOUT_S = 30.0


class Board:
    """Where all ranks put a tensor down and pick all up."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._parts: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, part: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' parts, in their order. Breaks where a rank does not come."""
        self._parts[rank] = part
        self._barrier.wait(_TIMEOUT_S)
        parts = list(self._parts)
        self._barrier.wait(_TIMEOUT_S)
        return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadGroup(TpGroup):
    """Position of a rank among threads."""

    board: Board

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in float32."""
        parts = self.board.exchange(self.rank, partial.float())
        return torch.stack(parts).sum(dim=0).to(partial.dtype)

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' parts along the last dimension, in float32."""
        return torch.cat(self.board.exchange(self.rank, part.float()), dim=-1)
