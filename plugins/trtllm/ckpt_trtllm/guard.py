"""No token from weights that are not known to be any one checkpoint, whoever resumes the engine.

Two lines of defence on each rank:

* the executor stays parked in its control action (see `ckpt_trtllm.hold`): a rank with a reason does not leave it, and the
  control side asks all ranks before it lets any go. Requests queue; `AsyncLLM.resume_generation` does not end that.
* the forward pass of the model engine raises. TensorRT-LLM fails the requests of that step; some of its versions end the
  executor loop with it, and other ranks may wait for this one. Both are better than its tokens: it is the last line.
"""

from __future__ import annotations

import functools
from typing import Any

from ckpt_core.errors import EngineStateError

WAITING = "the engine was started to wait for its first weights, and none have been committed"


class Guard:
    """Of one rank.

    Args:
        model_engine: what has `forward`; it is wrapped for good.

    Attributes:
        poison: armed by the core; None where it is not.
        uncommitted: an update that began and is neither committed nor undone; "" where there is none.
        waiting: no weights were ever committed, and dummy ones must not serve.
    """

    def __init__(self, model_engine: Any, *, rank: int) -> None:
        self._rank = rank
        self.poison: str | None = None
        self.uncommitted = ""
        self.waiting = False
        model_engine.forward = self._checked(model_engine.forward)

    @property
    def reason(self) -> str:
        """Why no token may be produced; "" where they may."""
        return self.poison or self.uncommitted or (WAITING if self.waiting else "")

    def check(self) -> None:
        """Raise where no token may be produced.

        Raises:
            EngineStateError: with the reason.
        """
        if reason := self.reason:
            raise EngineStateError(f"rank {self._rank} produces no token: {reason}; update the weights")

    def _checked(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def checked_forward(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return forward(*args, **kwargs)

        return checked_forward
