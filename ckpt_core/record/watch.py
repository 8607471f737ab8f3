"""All tensors of a live model: those that a replay writes, and those that it does not know of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from ckpt_core.checksum import checksum

_DEPTH = 3
_HOLD_NOTHING = (int, float, str, bytes, torch.dtype, torch.device, type(None))


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by path and name, shared ones under each of their names."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def sums_of_others(
    model: torch.nn.Module,
    written: Collection[str],
    ignored: Collection[str],
    wanted: Callable[[torch.Tensor], bool] = lambda tensor: True,
) -> dict[str, int]:
    """Checksums of all tensors that share no storage with the named ones of `written`; see `other_tensors`."""
    known = {name: tensor for name, tensor in named_tensors(model).items() if name in written}
    return {name: checksum(tensor) for name, tensor in other_tensors(model, known, ignored, wanted).items()}


def other_tensors(
    model: torch.nn.Module,
    known: Mapping[str, torch.Tensor],
    ignored: Collection[str],
    wanted: Callable[[torch.Tensor], bool] = lambda tensor: True,
) -> dict[str, torch.Tensor]:
    """Tensors with data that modules hold, or objects that they hold, and whose storage is none of `known`.

    Args:
        ignored: attributes that hold no weights, e.g. caches.
        wanted: of interest to the caller.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in known.values() if not tensor.is_meta}
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in _tensors_in(vars(module), path, ignored, seen, _DEPTH):
            if not wanted(tensor) or not tensor.numel() or tensor.is_meta:
                continue
            if tensor.untyped_storage().data_ptr() not in storages:
                found.setdefault(name, tensor)
    return found


def _tensors_in(
    holder: Any, path: str, ignored: Collection[str], seen: set[int], depth: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Called while an engine stands still, for each attribute of each module: what cannot hold a tensor goes first."""
    items = holder.items() if isinstance(holder, Mapping) else enumerate(holder)
    for key, value in list(items):
        if isinstance(value, _HOLD_NOTHING) or key in ignored or isinstance(value, torch.nn.Module):
            continue
        if isinstance(value, torch.Tensor):
            yield f"{path}.{key}", value
            continue
        inner = value if isinstance(value, dict | list | tuple) else getattr(value, "__dict__", None)
        if inner and depth and key != "_modules" and id(value) not in seen:
            seen.add(id(value))
            yield from _tensors_in(inner, f"{path}.{key}", ignored, seen, depth - 1)
