"""What the engine keeps of a bucket after its load: cloned, since the bucket's memory is written over at once.

Mappers of some models put parts aside until the others come (split projections). They keep what they were given: views of the
ring. Those are replaced where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, MutableSequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_DEPTH = 4  # containers in containers


def own(keepers: Iterable[Any], tensors: Iterable[torch.Tensor]) -> int:
    """Replace views of these tensors' memory by clones, in attributes of the keepers and in containers there.

    Returns:
        Bytes of all tensors that the keepers have now.
    """
    borrowed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept_bytes = 0

    def owned(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept_bytes
        kept_bytes += tensor.nbytes
        return tensor.clone() if tensor.untyped_storage().data_ptr() in borrowed else tensor

    for keeper in keepers:
        _replace(getattr(keeper, "__dict__", {}), owned, _DEPTH)
    return kept_bytes


def _replace(container: Any, owned: Callable[[torch.Tensor], torch.Tensor], depth: int) -> None:
    items = container.items() if isinstance(container, MutableMapping) else enumerate(container)
    for key, value in list(items):
        changed = _owned(value, owned, depth)
        if changed is not value:
            container[key] = changed


def _owned(value: Any, owned: Callable[[torch.Tensor], torch.Tensor], depth: int) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return owned(value)
    if depth and type(value) is tuple:
        return tuple(_owned(item, owned, depth - 1) for item in value)
    if depth and isinstance(value, MutableMapping | MutableSequence):
        _replace(value, owned, depth - 1)
    return value
