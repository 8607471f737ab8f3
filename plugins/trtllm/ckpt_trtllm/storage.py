"""Storage that CUDA graphs may have in them: kept while modules are rebuilt, and filled at the end.

`pre_reload_weights` registers new tensors, without values and at other addresses. What was there is remembered here, gets the new
values once they are processed, and is registered again. It survives an abort: until an update comes to its end, the old
addresses are still the right ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ckpt_core.errors import EngineError
from ckpt_trtllm import compat

if TYPE_CHECKING:
    import torch


class Storage:
    """Of the modules of one rank that are rebuilt."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[Any, torch.Tensor]] = {}

    @property
    def size_bytes(self) -> int:
        """What is in memory twice because of this."""
        return sum(tensor.nbytes for _, tensor in self._kept.values())

    def remember(self, modules: Iterable[tuple[str, Any]]) -> None:
        """Before modules are rebuilt. What is remembered already is older, and stays."""
        for path, module in modules:
            if compat.rebuilds(module):
                for name, tensor in _tensors_of(module):
                    self._kept.setdefault((path, name), (module, tensor))

    def fill(self) -> None:
        """Put every tensor back where it was, with its module's new values.

        Raises:
            EngineError: a module came out of its processing with another shape or type than it went in.
        """
        import torch

        for (path, name), (module, old) in self._kept.items():
            new = dict(_tensors_of(module)).get(name)
            if new is not None and new.data_ptr() == old.data_ptr():
                continue
            if new is None or (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
                raise EngineError(
                    f"{path}.{name}: expected {_kind(old)} as before the update, got {_kind(new)}; CUDA graphs have the old one "
                    "in them: restart the engine"
                )
            with torch.no_grad():
                old.data.copy_(new.data)
            _register(module, name, old)
        self._kept.clear()


def _tensors_of(module: Any) -> list[tuple[str, torch.Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _register(module: Any, name: str, tensor: torch.Tensor) -> None:
    registry = module._parameters if name in module._parameters else module._buffers
    registry[name] = tensor


def _kind(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
