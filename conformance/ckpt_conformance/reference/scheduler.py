"""Which requests run, which wait, and what a pause does to both. No processes, no threads: the engine's thread calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from ckpt_conformance.reference.messages import StepItem
from ckpt_conformance.reference.requests import FinishReason, Request
from ckpt_core.contract import PauseMode
from ckpt_core.errors import EngineStateError

PAUSE_MODES = (PauseMode.ABORT, PauseMode.WAIT, PauseMode.KEEP, PauseMode.RETRACT)


class Scheduler:
    """Continuous batching: a step is one token of each running request.

    Attributes:
        waiting: in order of arrival; they queue while paused.
        running: the ranks hold their keys and values, or will after the next step.
        pause_mode: None while serving.
    """

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pause_mode: PauseMode | None = None
        self.freed: list[int] = []

    @property
    def stopped(self) -> bool:
        """Paused, and nothing will step any more."""
        return self.pause_mode is not None and (self.pause_mode is not PauseMode.WAIT or not self.running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        if self.pause_mode is None:
            return bool(self.running or self.waiting)
        return not self.stopped

    @property
    def full(self) -> bool:
        """Whether another request would exceed the queue's limit."""
        return len(self.waiting) >= self.max_waiting

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def next_items(self) -> list[StepItem]:
        """What the next step computes; admits waiting requests unless paused."""
        while self.pause_mode is None and self.waiting and len(self.running) < self.max_running:
            self.running.append(self.waiting.popleft())
        return [_item(request) for request in self.running]

    def take(self, token_ids: Mapping[int, int], version: str) -> None:
        """Results of a step, by request; those that were cancelled meanwhile are passed over."""
        for request in self.running:
            if request.request_id in token_ids:
                request.take(token_ids[request.request_id], version)
        self._drop_finished()

    def cancel(self, request_id: int) -> None:
        """End a request whose client went away; unknown ones are no error."""
        for request in (*self.running, *self.waiting):
            if request.request_id == request_id:
                request.finish(FinishReason.ABORT)
        self._drop_finished()

    def end_all(self, reason: FinishReason, error: str = "") -> None:
        """End every request."""
        for request in (*self.running, *self.waiting):
            request.finish(reason, error)
        self._drop_finished()

    def pause(self, mode: PauseMode) -> None:
        """Pause, or pause more strongly.

        Raises:
            EngineStateError: mode wait while requests are frozen; they would never finish.
        """
        if mode is PauseMode.WAIT and self.stopped and self.running:
            raise EngineStateError(f"{len(self.running)} requests are frozen and cannot finish; resume first")
        self.pause_mode = mode
        if mode is PauseMode.ABORT:
            self.end_all(FinishReason.ABORT)
        elif mode is PauseMode.RETRACT:
            self._retract()

    def resume(self) -> None:
        """Serve again."""
        self.pause_mode = None

    def take_freed(self) -> list[int]:
        """Requests whose keys and values the ranks can forget, since the last call."""
        freed, self.freed = self.freed, []
        return freed

    def _retract(self) -> None:
        """Running requests lose their cache and go back to the front of the queue, in order."""
        for request in reversed(self.running):
            request.prefilled = False
            self.freed.append(request.request_id)
            self.waiting.appendleft(request)
        self.running.clear()

    def _drop_finished(self) -> None:
        self.freed.extend(request.request_id for request in self.running if request.finished)
        self.running = [request for request in self.running if not request.finished]
        self.waiting = deque(request for request in self.waiting if not request.finished)


def _item(request: Request) -> StepItem:
    if request.prefilled:
        return StepItem(sequence_id=request.request_id, token_ids=request.token_ids[-1:])
    tokens = [*request.prompt, *request.token_ids]
    return StepItem(sequence_id=request.request_id, token_ids=tokens, prefill=True)
