"""What the conformance harness needs of engines, real or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from ckpt_conformance.harness import NotOffered, Server
from ckpt_conformance.levels import ModelKind
from ckpt_trtllm.handles import Handle
from ckpt_trtllm.rank import TrtllmRank


class Engines(ABC):
    """Starts engines with one rank in this process.

    Attributes:
        name: for people.
        models: arguments of `make_tiny` by kind.
    """

    name: str
    models: ClassVar[dict[ModelKind, dict[str, Any]]]

    @abstractmethod
    def start(self, checkpoint: Path, kind: ModelKind, *, load_format: str, waiting: bool = False) -> TrtllmRank:
        """An engine that serves, but for a waiting one."""

    @abstractmethod
    def generate(self, rank: TrtllmRank, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy new token ids; raises where none come."""

    @abstractmethod
    def handle(self, rank: TrtllmRank) -> Handle:
        """How the control side reaches it."""

    @abstractmethod
    def close(self, rank: TrtllmRank) -> None:
        """It is not needed any more."""

    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> AbstractContextManager[Server]:
        """An engine of several ranks, called together."""
        raise NotOffered(f"server(): {self.name} has no engine of {ranks} ranks here")
