"""Tensors that must reach SGLang's loader in one call, kept until the last of them is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Named = tuple[str, torch.Tensor]


class Held:
    """Of one update.

    Args:
        together: by name, all names that go in one call; what is not here goes at once.
        clone: names whose tensors the loader writes to, and which must not be the ring's own memory.

    Attributes:
        retained_bytes: cloned and kept at present.
    """

    def __init__(self, together: Mapping[str, frozenset[str]], clone: frozenset[str]) -> None:
        self._together = together
        self._clone = clone
        self._waiting: dict[str, torch.Tensor] = {}
        self.retained_bytes = 0

    def ready(self, tensors: Sequence[Named], expected: frozenset[str]) -> Iterator[list[Named]]:
        """What can be loaded now: those of this bucket that need no others, then groups that became whole.

        Args:
            tensors: of the bucket; views that are gone when the bucket is.
            expected: names that will come; a group is whole without those that will not.
        """
        alone = [(name, self._own(name, tensor)) for name, tensor in tensors if name not in self._together]
        if alone:
            yield alone
        for name, tensor in tensors:
            if name not in self._together:
                continue
            self._keep(name, tensor)
            names = self._together[name] & expected
            if names <= self._waiting.keys():
                yield [(each, self._release(each)) for each in sorted(names)]

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if name in self._clone else tensor

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self._waiting[name] = tensor.clone()
        self.retained_bytes += tensor.nbytes

    def _release(self, name: str) -> torch.Tensor:
        tensor = self._waiting.pop(name)
        self.retained_bytes -= tensor.nbytes
        return tensor
