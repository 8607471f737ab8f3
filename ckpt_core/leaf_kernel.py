"""The kernel of `device_digest`: one warp a leaf."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_UNROLL = 4


@triton.jit  # type: ignore[untyped-decorator]
def _leaves(table, words, out, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202, N803
    leaf = tl.program_id(0)
    address = tl.load(table + leaf * 2)
    count = tl.load(table + leaf * 2 + 1)
    data = address.to(tl.pointer_type(tl.uint64))
    keys = words.to(tl.pointer_type(tl.uint64))
    stripe = tl.arange(0, 16)[:, None]
    pair = tl.arange(0, 4)[None, :]
    pairs = tl.arange(0, 4)
    place = stripe * 8 + pair * 2
    key_even = tl.load(keys + stripe + pair * 2)
    key_odd = tl.load(keys + stripe + pair * 2 + 1)
    last_even = tl.where(stripe == 15, tl.load(keys + 24 + pair * 2), key_even)
    last_odd = tl.where(stripe == 15, tl.load(keys + 25 + pair * 2), key_odd)
    scramble_even = tl.load(keys + 16 + pairs * 2)
    scramble_odd = tl.load(keys + 17 + pairs * 2)
    even = tl.load(keys + 40 + pairs * 2)
    odd = tl.load(keys + 41 + pairs * 2)
    blocks = (count + 127) // 128
    for start in range(0, blocks, UNROLL):
        for step in tl.static_range(UNROLL):
            number = start + step
            at = number * 128 + place
            word_even = tl.load(data + at, mask=at < count, other=0)
            word_odd = tl.load(data + at + 1, mask=at + 1 < count, other=0)
            last = number == blocks - 1
            mixed_even = word_even ^ tl.where(last, last_even, key_even)
            mixed_odd = word_odd ^ tl.where(last, last_odd, key_odd)
            added_even = tl.sum((mixed_even & 0xFFFFFFFF) * (mixed_even >> 32) + word_odd, axis=0)
            added_odd = tl.sum((mixed_odd & 0xFFFFFFFF) * (mixed_odd >> 32) + word_even, axis=0)
            summed_even = even + added_even
            summed_odd = odd + added_odd
            next_even = (summed_even ^ (summed_even >> 47) ^ scramble_even) * 0x9E3779B1
            next_odd = (summed_odd ^ (summed_odd >> 47) ^ scramble_odd) * 0x9E3779B1
            beyond = number >= blocks
            even = tl.where(beyond, even, tl.where(last, summed_even, next_even))
            odd = tl.where(beyond, odd, tl.where(last, summed_odd, next_odd))
    first = even ^ tl.load(keys + 32 + pairs * 2)
    second = odd ^ tl.load(keys + 33 + pairs * 2)
    folded = tl.sum((first * second) ^ tl.umulhi(first, second), axis=0)
    found = folded + blocks.to(tl.uint64) * 1024 * tl.load(keys + 48)
    found = (found ^ (found >> 37)) * tl.load(keys + 49)
    found = found ^ (found >> 32)
    tl.store(out + leaf, found.to(tl.int64, bitcast=True))


def launch(table: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Digests of the leaves in a table of addresses and words (int64 [n, 2]), int64 [n]."""
    out = torch.empty(len(table), dtype=torch.int64, device=table.device)
    if len(table):
        _leaves[len(table),](table, words, out, UNROLL=_UNROLL, num_warps=1)
    return out
