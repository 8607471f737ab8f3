"""Digests of runs of bytes that CPUs and accelerators compute alike: xxh3-64 over leaves, and over their digests.

A run is cut into leaves of 256 KiB. A leaf, filled up with zeros to a multiple of 1 KiB, is digested by xxh3-64 (Collet, xxHash
0.8): one leaf is too little work for an accelerator, a thousand of them keep it busy, and a CPU does them with the library. The
digest of the run is that of its leaves' digests and its length. Which byte lies where decides; how the run was cut on its way
does not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

LEAF_BYTES = 1 << 18
FILL_BYTES = 1 << 10

Digests = npt.NDArray[np.uint64]


def leaf_count(size_bytes: int) -> int:
    """Leaves of a run of that length; an empty one has none."""
    return -(-size_bytes // LEAF_BYTES)


def leaves_of(data: npt.NDArray[np.uint8]) -> Digests:
    """Digest of each leaf of a run (contiguous)."""
    view, digest = data.data, xxhash.xxh3_64_intdigest
    whole = data.size // LEAF_BYTES * LEAF_BYTES
    found = [digest(view[first : first + LEAF_BYTES]) for first in range(0, whole, LEAF_BYTES)]
    if rest := data.size - whole:
        found.append(digest(bytes(view[whole:]) + bytes(-rest % FILL_BYTES)))
    return np.array(found, dtype=np.uint64)


def fold(leaves: Digests, size_bytes: int) -> int:
    """Digest of a run by those of its leaves."""
    return xxhash.xxh3_64_intdigest(leaves.astype("<u8").tobytes() + struct.pack("<q", size_bytes))


def run_digest(data: npt.NDArray[np.uint8]) -> int:
    """Digest of a run (contiguous)."""
    return fold(leaves_of(data), data.size)


def fold_each(leaves: Digests, sizes_bytes: Sequence[int]) -> list[int]:
    """Digests of runs whose leaves follow each other."""
    found, first = [], 0
    for size in sizes_bytes:
        count = leaf_count(size)
        found.append(fold(leaves[first : first + count], size))
        first += count
    return found
