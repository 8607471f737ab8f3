"""The executor loop of one rank, parked: TensorRT-LLM's own control action, entered by a pause and left by a resume.

While every rank of an engine is in a control action no step runs, and requests that come queue. It is what the engine's own
weight update does for the length of one call; here it lasts from the pause to the resume.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ckpt_core.errors import EngineStateError


class Hold:
    """Of one rank. All ranks must take it in one call: the executor waits for all of them."""

    def __init__(self, engine: Any, *, drain_option: bool) -> None:
        self._engine = engine
        self._drain_option = drain_option
        self._stack: ExitStack | None = None

    @property
    def taken(self) -> bool:
        """Whether no step can run on this rank."""
        return self._stack is not None

    def take(self) -> None:
        """Wait until all requests have finished, and park. Taken already: nothing happens."""
        if self._stack is not None:
            return
        stack = ExitStack()
        stack.enter_context(self._engine.control_action(**({"drain": True} if self._drain_option else {})))
        self._stack = stack

    def leave(self) -> None:
        """Let the executor go on. Not taken: nothing happens."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def check(self, rank: int) -> None:
        """Raise where steps may run.

        Raises:
            EngineStateError: nothing was changed.
        """
        if not self.taken:
            raise EngineStateError(
                f"rank {rank}: the executor is not paused, requests would mix old and new weights; "
                "pause it first (`ckpt update` does)"
            )
