"""Comparisons of live weights bit by bit, values that cannot be right, and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from ckpt_conformance.checks.registry import CheckFailed
from ckpt_core.errors import EngineStateError

Bits = Mapping[str, torch.Tensor]


def spoil(live: Bits) -> None:
    """Fill with what no update can have written: NaN, or the least integer, which symmetric quantisation never makes."""
    for tensor in live.values():
        tensor.copy_(_wrong_value(tensor))


def same_bits(expected: Bits, got: Bits, *, rank: str, what: str) -> None:
    """Compare two sets of tensors bit by bit (NaN equals NaN of the same bits).

    Args:
        what: whose bits are expected, e.g. "a fresh start".

    Raises:
        CheckFailed: names the first tensor that differs, where, and both values.
    """
    if expected.keys() != got.keys():
        raise CheckFailed(expected=f"the tensors of {what}", got=_names_differ(expected, got), rank=rank)
    for name, wanted in expected.items():
        if difference := _difference(wanted, got[name]):
            raise CheckFailed(
                expected=f"the bits of {what}: {difference[0]}", got=difference[1], tensor=name, rank=rank
            )


def differs(one: Bits, other: Bits) -> bool:
    """Whether any bit differs."""
    return one.keys() != other.keys() or any(_difference(tensor, other[name]) for name, tensor in one.items())


@contextmanager
def must_raise(what: str, *, rank: str = "", tensor: str = "") -> Iterator[None]:
    """The block must raise an exception, of any type.

    Raises:
        CheckFailed: it did not.
    """
    try:
        yield
    except Exception:  # noqa: BLE001 how engines call their errors is their own matter
        return
    raise CheckFailed(expected=f"{what} raises", got="it returned", rank=rank, tensor=tensor)


@contextmanager
def must_refuse(what: str, *, rank: str = "") -> Iterator[None]:
    """The block must raise EngineStateError, by which the core knows that nothing was changed.

    Raises:
        CheckFailed: it did not, or raised another.
    """
    try:
        yield
    except EngineStateError:
        return
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckFailed(expected=f"{what} raises EngineStateError", got=got, rank=rank) from error
    raise CheckFailed(expected=f"{what} raises EngineStateError", got="it returned", rank=rank)


def _wrong_value(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # all bits set is NaN in every floating type, the one-byte types included, where fill_ is not implemented
    size = tensor.element_size()
    pattern = [0xFF] * size if tensor.is_floating_point() else [0] * (size - 1) + [0x80]
    return torch.tensor(pattern, dtype=torch.uint8, device=tensor.device).view(tensor.dtype)[0].expand_as(tensor)


def _names_differ(expected: Bits, got: Bits) -> str:
    absent, more = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    return f"without {absent[:4]} ({len(absent)}), and also {more[:4]} ({len(more)})"


def _difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[str, str] | None:
    """None where equal, else what was expected and what was got."""
    if expected.dtype != got.dtype or expected.shape != got.shape:
        return f"{expected.dtype} {list(expected.shape)}", f"{got.dtype} {list(got.shape)}"
    unlike = (_bytes(expected) != _bytes(got)).view(-1, expected.element_size()).any(dim=1)
    count = int(unlike.sum())
    if not count:
        return None
    first = int(unlike.nonzero()[0])
    index = [int(i) for i in np.unravel_index(first, tuple(expected.shape))]
    spoilt = torch.equal(_bytes(got), _bytes(_wrong_value(got)))
    remark = "; nothing was written at all" if spoilt else ""
    text = f"{got.reshape(-1)[first].item()} ({count} of {unlike.numel()} elements differ{remark})"
    return f"{expected.reshape(-1)[first].item()} at {index}", text


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
