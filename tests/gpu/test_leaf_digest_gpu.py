"""Digests made on a GPU are the library's, whatever the length and wherever the bytes begin."""

from __future__ import annotations

import pytest
import torch

from ckpt_core.device_digest import Leaves, by_torch
from ckpt_core.leaf_digest import LEAF_BYTES, run_digest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

LENGTHS = [
    0,
    1,
    7,
    8,
    9,
    1000,
    1023,
    1024,
    1025,
    5000,
    LEAF_BYTES - 8,
    LEAF_BYTES,
    LEAF_BYTES + 1,
    10 * LEAF_BYTES + 12,
]


@pytest.fixture(scope="module")
def source() -> torch.Tensor:
    return torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first", [0, 1, 4, 8, 250])
def test_same_digests_as_on_the_cpu(source: torch.Tensor, first: int) -> None:
    there = source.cuda()
    runs = [there[first : first + length] for length in LENGTHS]
    wanted = [run_digest(source[first : first + length].numpy()) for length in LENGTHS]
    leaves = Leaves(runs)
    assert leaves.digests() == wanted
    assert leaves.digests() == wanted  # made once, computed again
    there.add_(1)
    changed = source + 1
    assert leaves.digests() == [run_digest(changed[first : first + length].numpy()) for length in LENGTHS]


def test_both_roads_agree(source: torch.Tensor) -> None:
    there = source.cuda()[: 9 * LEAF_BYTES + 512]
    assert torch.equal(by_torch([there]), Leaves([there]).compute())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_of_any_type(dtype: torch.dtype) -> None:
    values = (torch.arange(100_003) % 2).to(dtype)
    assert Leaves([values.cuda()]).digests() == Leaves([values]).digests()
