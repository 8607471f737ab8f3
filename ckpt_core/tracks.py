"""The spans of this process in one update, on the host and on its device, if they were asked for."""

from __future__ import annotations

from ckpt_core import process
from ckpt_core.device import StreamTimer
from ckpt_core.trace import Lane, SpanRecorder, Track, TrackKind, Unrecorded


class ProcessTracks:
    """Recorders of one process, and the tracks that they make.

    Args:
        name, kind: whose they are.
        wanted: record at all.

    Attributes:
        spans: of the host.
        timer: of the device, where it has a clock of its own; set by whoever owns the stream.
    """

    def __init__(self, name: str, kind: TrackKind, *, wanted: bool) -> None:
        self._name = name
        self._kind = kind
        self.wanted = wanted
        self.spans: SpanRecorder = SpanRecorder() if wanted else Unrecorded()
        self.timer: StreamTimer | None = None

    def take(self) -> tuple[Track, ...]:
        """Tracks so far; none where none are wanted."""
        if not self.wanted:
            return ()
        recorders = {Lane.HOST: self.spans.take()}
        if self.timer is not None:
            recorders[Lane.DEVICE] = self.timer.take()
        here = process.current()
        return tuple(
            Track(
                name=self._name,
                kind=self._kind,
                lane=lane,
                pid=here.pid,
                boot_id=here.boot_id,
                spans=spans,
                dropped=dropped,
            )
            for lane, (spans, dropped) in recorders.items()
        )
