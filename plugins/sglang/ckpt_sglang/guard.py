"""No token from weights that are not known to be any one checkpoint, whoever asks or resumes.

Three lines of defence, in the rank processes of SGLang:

* the *gate*: the rank that takes requests from outside refuses them (503) and drops a resume before it hands them on to
  the other ranks, so that all ranks agree without a collective; SGLang lives on and a later update repairs it;
* the scheduler is paused while the guard is armed, so that requests it holds already do not step;
* the forward pass raises: the last line, for roads that nobody thought of.

A rank knows of the others' guards by a board in the key-value store of the process group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ckpt_sglang import compat

_log = logging.getLogger(__name__)
HTTP_UNAVAILABLE = 503
WAITING = "no weights were committed yet: the server was started to wait for them"


class Board:
    """What each rank of this instance says of its weights: a reason not to serve them, or "".

    Args:
        store: key-value store of the ranks; None where there is one rank.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank] if store is not None else []
        self._looked = True  # nothing was ever written, so all are clean
        self._own = ""

    def write(self, reason: str) -> None:
        """Tell the others; "" for whole weights."""
        self._own = reason
        if self._others:
            self._store.set(f"guard/{self._rank}", reason or "-")

    def look_again(self) -> None:
        """An update begins: what was seen of the others holds no more."""
        self._looked = False

    def reason(self) -> str:
        """Why this instance may not serve: this rank's reason, or another's."""
        if self._own or self._looked:
            return self._own
        for other in self._others:
            key = f"guard/{other}"
            text = self._store.get(key).decode() if self._store.check([key]) else "-"
            if text != "-":
                return f"rank {other}: {text}"
        self._looked = True
        return ""


class Guard:
    """The guard of one rank.

    Args:
        scheduler: SGLang's, of this rank.
        board: of this instance.
        waiting: the server was started to wait for its first weights.
    """

    def __init__(self, scheduler: Any, board: Board, *, waiting: bool) -> None:
        self._scheduler = scheduler
        self.board = board
        self._poison: str | None = None
        self._updating = ""
        self.waiting = waiting
        self._paused_here = False
        self._publish()

    @property
    def own_reason(self) -> str:
        """Why this rank may not produce tokens; "" where it may."""
        return self._poison or self._updating or (WAITING if self.waiting else "")

    @property
    def poison(self) -> str:
        """Why the weights of this rank are not known to be one checkpoint; "" where they are, or never were any."""
        return self._poison or ""

    def arm(self, cause: str) -> None:
        """No token from here on, not even for requests that are there already."""
        self._poison = cause
        if not compat.is_paused(self._scheduler):
            self._paused_here = True
            compat.set_paused(self._scheduler, paused=True)
        self._publish()

    def disarm(self) -> None:
        """The weights are those of one checkpoint; a server that waits for its first goes on waiting."""
        self._poison = None
        if self._paused_here:
            self._paused_here = False
            compat.set_paused(self._scheduler, paused=False)
        self._publish()

    def mark_updating(self, update_id: str) -> None:
        """From begin on, until abort says that nothing was touched or a commit disarms; "" takes it back."""
        self._updating = f"update {update_id} is not committed" if update_id else ""
        self._publish()

    def first_weights(self) -> None:
        """A commit: no more waiting."""
        self.waiting = False
        self._publish()

    def check(self) -> None:
        """Raise where this rank may not step.

        Raises:
            RuntimeError: it may not. That ends the engine, and is better than its tokens.
        """
        if reason := self.own_reason:
            raise RuntimeError(f"ckpt: no forward pass from these weights: {reason}")

    def _publish(self) -> None:
        self.board.write(self.own_reason)


class Gate:
    """On the rank that takes requests from outside: lets through what may pass while the guard is armed."""

    def __init__(self, scheduler: Any, reason: Callable[[], str]) -> None:
        self._scheduler = scheduler
        self._reason = reason

    def passed(self, requests: Sequence[Any]) -> list[Any]:
        """The requests that all ranks may see; the others are answered here."""
        reason = self._reason()
        return list(requests) if not reason else [request for request in requests if self._lets(request, reason)]

    def _lets(self, request: Any, reason: str) -> bool:
        resume, single, batch = compat.request_kinds()
        if isinstance(request, resume):
            _log.error("ckpt: a resume is refused: %s", reason)
            return False
        if isinstance(request, batch):
            parts: Iterable[Any] = request  # type: ignore[assignment]
            for part in parts:
                self._refuse(part, reason)
            return False
        if isinstance(request, single):
            self._refuse(request, reason)
            return False
        return True

    def _refuse(self, request: Any, reason: str) -> None:
        if compat.is_health_check(request):
            return  # any answer would count as health
        text = f"refused: {reason}; update the weights (ckpt update), or restart the server"
        compat.abort_output(self._scheduler, request, text, HTTP_UNAVAILABLE)
