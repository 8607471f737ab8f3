"""A sum over elements that depends on their bits and places: equal sums, equal tensors, in whatever parts they came.

Each element's bits and place are mixed to 64 bits (multiply and xor-shift, as in splitmix64, Steele et al. 2014) and added up,
so parts may come in any order and add to the whole. The same value on CPUs (numpy, whose products of 64 bits are ten times as
fast there) and on GPUs (torch).
"""

from __future__ import annotations

import numpy as np
import torch

from ckpt_core.strided import Strided

_PLACE = -7046029254386353131  # 0x9E3779B97F4A7C15
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
# of one step: temporaries are 8 bytes an element, and have to fit into a CPU's caches, or beside a model on a GPU
_MOST_ELEMENTS = {"cpu": 1 << 16}
_MOST_ELSEWHERE = 1 << 23
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD = 1 << 64


def checksum(values: torch.Tensor, places: Strided | None = None) -> int:
    """Sum of a tensor, or of a part of one.

    Args:
        values: of any strides, at most 8 bytes an element; complex ones only whole.
        places: flat positions in the whole, of the shape of `values`; None: as in a contiguous tensor.

    Returns:
        An unsigned 64-bit number; add those of parts modulo 2**64.
    """
    if values.is_complex():
        values = torch.view_as_real(values.detach().resolve_conj())
    places = places or Strided.whole(values.shape)
    steps = _steps(values.detach(), places)
    if values.device.type == "cpu":
        return sum(_sum_on_cpu(part, where) for part, where in steps) % _WORD
    return int(torch.stack([_sum(part, where) for part, where in steps]).sum()) % _WORD if steps else 0


def add(first: int, second: int) -> int:
    """Sum of two parts."""
    return (first + second) % _WORD


def _steps(values: torch.Tensor, places: Strided) -> list[tuple[torch.Tensor, Strided]]:
    """Cut along the first dimension until each part is small enough."""
    if values.numel() <= _MOST_ELEMENTS.get(values.device.type, _MOST_ELSEWHERE) or not values.dim():
        return [(values, places)] if values.numel() else []
    d = next(d for d, n in enumerate(values.shape) if n > 1)
    half = values.shape[d] // 2
    found = []
    for first, count in ((0, half), (half, values.shape[d] - half)):
        size = (*places.size[:d], count, *places.size[d + 1 :])
        part = Strided(offset=places.offset + first * places.stride[d], size=size, stride=places.stride)
        found += _steps(values.narrow(d, first, count), part)
    return found


def _sum(values: torch.Tensor, places: Strided) -> torch.Tensor:
    device = values.device
    bits = values.contiguous().view(_BITS[values.element_size()]).to(torch.int64)
    where = torch.full((1,) * values.dim(), places.offset + 1, dtype=torch.int64, device=device)
    for d, (n, stride) in enumerate(zip(places.size, places.stride, strict=True)):
        shape = [1] * values.dim()
        shape[d] = n
        where = where + (torch.arange(n, dtype=torch.int64, device=device) * stride).view(shape)
    mixed = where * _PLACE + bits
    mixed = (mixed ^ shifted_right(mixed, 30)) * _FIRST
    mixed = (mixed ^ shifted_right(mixed, 27)) * _SECOND
    return (mixed ^ shifted_right(mixed, 31)).sum()


def shifted_right(values: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift of int64 numbers, any shape, by 1 to 63 bits; torch has the arithmetic one only."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _sum_on_cpu(values: torch.Tensor, places: Strided) -> int:
    bits = values.contiguous().view(_BITS[values.element_size()]).numpy().astype(np.int64).view(np.uint64)
    where = np.full((1,) * bits.ndim, places.offset + 1, dtype=np.uint64)
    for d, (n, stride) in enumerate(zip(places.size, places.stride, strict=True)):
        shape = [1] * bits.ndim
        shape[d] = n
        where = where + (np.arange(n, dtype=np.uint64) * np.uint64(stride)).reshape(shape)
    bits += where * np.uint64(_PLACE % _WORD)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor % _WORD)
    bits ^= bits >> np.uint64(31)
    return int(bits.sum(dtype=np.uint64))
