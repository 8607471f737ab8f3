"""Sums of live tensors are the same on a GPU and on the CPU, or a proof made by them would compare nothing."""

from __future__ import annotations

import pytest
import torch

from ckpt_core.checksum import add, checksum
from ckpt_core.strided import Strided

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_sum_as_on_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    values = (torch.arange(5000).reshape(50, 100) % 127).to(torch.float32).to(dtype)
    for there in (values, values.T, values[3:40:2, 5:77]):
        assert checksum(there.to(device)) == checksum(there)


def test_parts_add_up_to_a_whole_that_takes_several_steps(device: torch.device) -> None:
    values = torch.arange(20_000_000, dtype=torch.int32, device=device).reshape(4000, 5000)
    left = Strided(offset=0, size=(4000, 1000), stride=(5000, 1))
    right = Strided(offset=1000, size=(4000, 4000), stride=(5000, 1))
    parts = add(checksum(values[:, :1000], left), checksum(values[:, 1000:], right))
    assert parts == checksum(values)
    values[3999, 4999] += 1
    assert parts != checksum(values)
