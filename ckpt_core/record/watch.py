"""All tensors of a live model: those that a replay writes, and those that it does not know of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_DEPTH = 3


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by path and name, shared ones under each of their names."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor and where the model keeps it: another may be there later."""

    name: str
    holder: Any
    key: Any

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is there now."""
        try:
            found = self.holder[self.key]
        except (LookupError, TypeError):
            return None
        return found if isinstance(found, torch.Tensor) else None


def other_tensors(
    model: torch.nn.Module, known: Mapping[str, torch.Tensor], ignored: Collection[str]
) -> dict[str, Held]:
    """Tensors with data that modules hold, or objects that they hold, and whose storage is none of `known`.

    Args:
        ignored: attributes that hold no weights, e.g. caches.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in known.values() if not tensor.is_meta}
    found: dict[str, Held] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for held in _held_in(vars(module), path, ignored, seen, _DEPTH):
            tensor = held.tensor
            if tensor is None or not tensor.numel() or tensor.is_meta:
                continue
            if tensor.untyped_storage().data_ptr() not in storages:
                found.setdefault(held.name, held)
    return found


def _held_in(holder: Any, path: str, ignored: Collection[str], seen: set[int], depth: int) -> Iterator[Held]:
    items = holder.items() if isinstance(holder, Mapping) else enumerate(holder)
    for key, value in list(items):
        name = f"{path}.{key}"
        if key in ignored or isinstance(value, torch.nn.Module):
            continue
        if isinstance(value, torch.Tensor):
            yield Held(name=name, holder=holder, key=key)
        elif depth and id(value) not in seen:
            seen.add(id(value))
            inner = value if isinstance(value, dict | list | tuple) else getattr(value, "__dict__", None)
            if inner:
                yield from _held_in(inner, name, ignored, seen, depth - 1)
