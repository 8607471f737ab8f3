"""Giving back pages in the middle of a file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

Span = tuple[int, int]


def pages_of(spans: Iterable[Span]) -> list[Span]:
    """The whole pages that these bytes touch: spans in order, none touching another."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        first, last = start // PAGE_BYTES * PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def gaps_between(pages: Sequence[Span], size_bytes: int) -> list[Span]:
    """The pages of a file of that size that are not among `pages`, which are as `pages_of` gives them."""
    starts = [0, *(end for _, end in pages)]
    ends = [*(start for start, _ in pages), -(-size_bytes // PAGE_BYTES) * PAGE_BYTES]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def punch(descriptor: int, span: Span) -> bool:
    """Give back a span of a file, which reads as zeros then; False where the file system cannot."""
    start, end = span
    return bool(_libc().fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, end - start) == 0)


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc
