"""How fast bytes leave hosts, by the counters of their links: what processes say of their own times may overlap, or not."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from ckpt_conformance.namespaces import NetHost

_EVERY_S = 0.02
_EDGE = 0.05  # the first and the last bytes are those of greetings and of whoever is last


class LinkWatch:
    """A context manager: looks at the links of these hosts, in a thread, from its start to its end."""

    def __init__(self, hosts: Sequence[NetHost]) -> None:
        self._hosts = hosts
        self._earlier = [host.bytes_out() for host in hosts]
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="links", daemon=True)

    def __enter__(self) -> LinkWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def came_out(self) -> list[int]:
        """Bytes that left each host since this was made, with headers."""
        return [host.bytes_out() - earlier for host, earlier in zip(self._hosts, self._earlier, strict=True)]

    def bytes_per_s(self) -> float:
        """Of all hosts together, without the first and the last bytes; 0 where they were not seen on their way."""
        total = sum(self.came_out())
        inside = [(at, size) for at, size in self._samples if _EDGE * total <= size <= (1 - _EDGE) * total]
        if len(inside) < 2:
            return 0.0
        (start, first), (stop, last) = inside[0], inside[-1]
        return (last - first) / (stop - start)

    def _look(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._samples.append((time.monotonic(), sum(self.came_out())))
