"""Spans of a device's work, between events of its own, put on the host's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from ckpt_core.trace import MOST_SPANS, Span, SpanStage

_E = TypeVar("_E", bound="TimedEvent")


class TimedEvent(Protocol):
    """A point in a device's stream that knows its time."""

    def record(self, stream: Any) -> None:
        """Put it at the present end of a stream."""

    def reached(self) -> bool:
        """Whether all work before it is complete."""

    def since(self: _E, earlier: _E) -> float:
        """Seconds on the device between two reached events."""

    def close(self) -> None:
        """Destroy it."""


class DeviceSpans(Generic[_E]):
    """Spans between device events, put on the host's clock by one anchor event, whose host time is known.

    Nothing waits while spans are recorded; `take` asks for times after the stream has got there. Events are used again
    by the next update. Start and stop of a span are two events: only so the idle time between buckets is seen.

    Args:
        make: a new event with timing.
        limit: spans kept between two calls of `take`; further ones are counted as dropped.
    """

    _ANCHORS = 3

    def __init__(self, make: Callable[[], _E], limit: int = MOST_SPANS) -> None:
        self._make = make
        self._limit = limit
        self._free: list[_E] = []
        self._pending: deque[tuple[SpanStage, int, int, _E, _E]] = deque()
        self._begun: _E | None = None
        self._anchor: _E | None = None
        self._anchor_s = 0.0
        self._dropped = 0
        self.uncertainty_s = 0.0

    def anchor(self, stream: Any, *, timeout_s: float = 1.0) -> None:
        """Tie the two clocks before each update, on an idle stream: some 30 us. Forgets what was not taken, as after an abort.

        The best of a few tries is kept; `uncertainty_s` bounds its error. A stream that is busy for `timeout_s` gets no
        anchor, and its spans are dropped.
        """
        self._forget()
        for _ in range(self._ANCHORS):
            event = self._event()
            before_s = time.monotonic()
            event.record(stream)
            while not (reached := event.reached()) and time.monotonic() - before_s < timeout_s:
                pass
            half_s = (time.monotonic() - before_s) / 2
            if reached and (self._anchor is None or half_s < self.uncertainty_s):
                event, self._anchor = self._anchor or self._event(), event
                self._anchor_s, self.uncertainty_s = before_s + half_s, half_s
            self._free.append(event)
            if not reached:
                return

    def start(self, stream: Any) -> None:
        """What the stream does from here on belongs to the span that the next `stop` ends."""
        if self._begun is None:
            self._begun = self._event()
        self._begun.record(stream)

    def stop(self, stream: Any, stage: SpanStage, bucket: int, size_bytes: int = 0) -> None:
        """End the span at the present end of the stream."""
        assert self._begun is not None, "stop of a span that was not started"
        if len(self._pending) >= self._limit:
            self._dropped += 1
            return
        end = self._event()
        end.record(stream)
        self._pending.append((stage, bucket, size_bytes, self._begun, end))
        self._begun = None

    def take(self) -> tuple[tuple[Span, ...], int]:
        """The spans whose end the device has reached, in order, and how many were dropped; the others stay for the next
        call. Without an anchor the spans have no place in time: they are dropped."""
        found: list[Span] = []
        while self._pending and self._pending[0][-1].reached():
            stage, bucket, size_bytes, begun, ended = self._pending.popleft()
            self._free += (begun, ended)
            if self._anchor is None:
                self._dropped += 1
                continue
            start_s = self._anchor_s + begun.since(self._anchor)
            found.append(Span(stage, bucket, start_s, start_s + ended.since(begun), size_bytes))
        dropped, self._dropped = self._dropped, 0
        return tuple(found), dropped

    def close(self) -> None:
        """Destroy all events."""
        self._forget()
        while self._free:
            self._free.pop().close()

    def _event(self) -> _E:
        return self._free.pop() if self._free else self._make()

    def _forget(self) -> None:
        """Back to the start; events that the device has not reached may be recorded again all the same."""
        for pending in self._pending:
            self._free += pending[-2:]
        self._free += [event for event in (self._begun, self._anchor) if event is not None]
        self._pending.clear()
        self._begun = self._anchor = None
        self._dropped = 0
