"""Where a piece of a bucket lies in its tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckpt_core.contract import LoadTensor
from ckpt_core.errors import PlanError


def piece_span(item: LoadTensor, shape: Sequence[int]) -> tuple[int, int]:
    """First element and number of elements, counted in the checkpoint tensor.

    Raises:
        PlanError: it is not one run of elements.
    """
    if item.box is None:
        return 0, math.prod(shape)
    runs = item.box.byte_runs(shape, 1)
    if runs.count > 1:
        raise PlanError(f"tensor {item.name!r}: expected a part that is contiguous in {list(shape)}, got {item.box}")
    return runs.first_offset_bytes, runs.run_bytes
