"""What the columns of needs and plans are made of: numpy arrays, one place per tensor, piece or bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]


def ints(values: Sequence[int] | Sequence[Sequence[int]] | Ints) -> Ints:
    """A column of whole numbers."""
    return np.asarray(values, dtype=np.int64)


def starts_of(counts: Ints) -> Ints:
    """Where each run begins, for runs of these lengths one behind the other; one more for the end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def ranges(starts: Ints, counts: Ints) -> Ints:
    """All of `arange(start, start + count)`, one behind the other."""
    begins = starts_of(counts)
    return np.arange(begins[-1]) + np.repeat(starts - begins[:-1], counts)


def sums(keys: Ints, weights: Ints, length: int) -> Ints:
    """Sum of the weights by key, exactly: bincount adds in floating point, which is exact below 2**53 only."""
    total = np.zeros(length, dtype=np.int64)
    np.add.at(total, keys, weights)
    return total
