"""Named tensors in the host pool: each update's in a place of its own, as long as they are to stay warm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.pool_file import restage_tensors, stage_tensors
from ckpt_core.shm import remove_directory
from ckpt_core.source import SourceIndex

if TYPE_CHECKING:
    import torch


class StagedTensors:
    """Of so many updates, the last ones."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._staged: deque[SourceIndex] = deque()  # oldest first

    def stage(self, tensors: Mapping[str, torch.Tensor], directory: Callable[[], Path]) -> SourceIndex:
        """Write them over those of the oldest update, where names, dtypes and shapes are the same; else into a new directory.

        Raises:
            CapacityError: there is no room.
        """
        if len(self._staged) >= self._keep:
            oldest = self._staged.popleft()
            if (again := restage_tensors(tensors, oldest)) is not None:
                self._staged.append(again)
                return again
            remove_directory(Path(oldest.files[0].path).parent)
        self._staged.append(stage_tensors(tensors, directory()))
        return self._staged[-1]
