"""The checksum of a tensor against what may happen to it."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_core.checksum import _sum, _sum_on_cpu, add, checksum
from ckpt_core.strided import Strided, row_major

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool)


@st.composite
def tensors(draw):
    """Any bits, no larger than a few thousand elements."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@given(tensors(), st.data())
def test_parts_add_to_the_whole(tensor, data):
    d = data.draw(st.integers(0, tensor.dim() - 1))
    cut = data.draw(st.integers(0, tensor.shape[d]))
    stride = row_major(tensor.shape)
    total = 0
    for first, count in ((0, cut), (cut, tensor.shape[d] - cut)):
        part = tensor.narrow(d, first, count)
        total = add(total, checksum(part, Strided(offset=first * stride[d], size=tuple(part.shape), stride=stride)))
    assert total == checksum(tensor)


@given(tensors(), st.data())
def test_a_flipped_bit_is_seen(tensor, data):
    assume(tensor.dtype is not torch.bool)
    changed = tensor.clone()
    raw = changed.reshape(-1).view(torch.uint8)
    position = data.draw(st.integers(0, raw.numel() - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(changed.reshape(-1)) != checksum(tensor.reshape(-1))


@given(tensors(), st.data())
def test_swapped_elements_are_seen(tensor, data):
    flat = tensor.reshape(-1)
    first, second = (data.draw(st.integers(0, flat.numel() - 1)) for _ in range(2))
    bits = flat.clone().view(torch.uint8).reshape(flat.numel(), -1)
    assume(not torch.equal(bits[first], bits[second]))
    bits[[first, second]] = bits[[second, first]]
    assert checksum(bits.reshape(-1).view(tensor.dtype)) != checksum(flat)


@given(tensors())
def test_strides_do_not_matter(tensor):
    assert checksum(tensor.t() if tensor.dim() == 2 else tensor) == checksum(
        (tensor.t() if tensor.dim() == 2 else tensor).contiguous()
    )


@given(tensors())
def test_both_ways_to_compute_it_agree(tensor):
    places = Strided.whole(tensor.shape)
    assert int(_sum(tensor, places)) % (1 << 64) == _sum_on_cpu(tensor, places)


def test_steps_do_not_matter(monkeypatch):
    tensor = torch.arange(10_000, dtype=torch.float32).reshape(100, 100)
    whole = checksum(tensor)
    monkeypatch.setattr("ckpt_core.checksum._MOST_ELEMENTS", {"cpu": 64})
    assert checksum(tensor) == whole
