"""No garbage collection while engines do not serve: a full one, in a process with an engine in it, takes as long as many buckets,
and thousands of new objects of a plan set off several."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Reference counts alone, for as long as the block runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
