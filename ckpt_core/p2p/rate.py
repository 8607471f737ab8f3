"""A limit on reads, in bytes a second, so that those who serve keep bandwidth for their own traffic (`--max-rate`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ckpt_core.errors import ConfigError

Clock = Callable[[], float]


class TokenBucket:
    """Says how long to wait before a read, so that over any time `s` at most `rate * s + burst` bytes are let through.

    It never sleeps: the caller waits, or does something else. Each `take` is granted, behind all before it; one after another may
    wait at the same time. Threads may share it. The idea is the leaky bucket as a meter (Turner 1986).
    """

    def __init__(self, rate_bytes_per_s: float, *, burst_bytes: int, clock: Clock = time.monotonic) -> None:
        """Begins full.

        Args:
            rate_bytes_per_s: in the long run.
            burst_bytes: at once, after a pause: also the largest read. The smaller, the evener.
            clock: seconds, from anywhere; a step back counts as no time.

        Raises:
            ConfigError: a rate or a burst that lets nothing through.
        """
        if not 0 < rate_bytes_per_s < float("inf"):
            raise ConfigError(
                f"max rate: expected bytes a second above 0, got {rate_bytes_per_s}; leave it out for no limit"
            )
        if burst_bytes < 1:
            raise ConfigError(f"burst: expected at least 1 byte, got {burst_bytes}; take the size of the largest read")
        self.rate_bytes_per_s = rate_bytes_per_s
        self.burst_bytes = burst_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(burst_bytes)  # below 0: bytes granted to those who still wait
        self._at = clock()

    def take(self, size_bytes: int) -> float:
        """Seconds from now after which this many bytes may be read; 0 for at once.

        Raises:
            ConfigError: more than the burst; cut such a read.
        """
        if not 0 <= size_bytes <= self.burst_bytes:
            raise ConfigError(
                f"read: expected 0 to {self.burst_bytes} bytes (the burst of the rate limit), got {size_bytes}; "
                "cut it, or choose a larger burst"
            )
        with self._lock:
            now = max(self._clock(), self._at)
            earned = (now - self._at) * self.rate_bytes_per_s
            self._tokens = min(self._tokens + earned, self.burst_bytes) - size_bytes
            self._at = now
            return max(0.0, -self._tokens / self.rate_bytes_per_s)
