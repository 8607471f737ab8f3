"""`leaf_digest` on an accelerator: leaves of any number of runs in one launch, as fast as its memory can be read.

xxh3-64 of a leaf is a chain over blocks of 1 KiB, but what a block adds to the chain does not depend on the chain. One warp
takes a leaf, and many leaves hide what each waits for. With triton where it is installed (torch brings it for GPUs), else
with torch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import torch

from ckpt_core.checksum import shifted_right
from ckpt_core.leaf_digest import FILL_BYTES, LEAF_BYTES, Digests, fold_each, leaf_count, leaves_of

_WORD_BYTES = 8
_STRIPES, _LANES = 16, 8  # of a block
_LEAVES_AT_ONCE = 1024
# XXH3's default secret, primes and first sums, by the xxHash specification
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32_1 = 0x9E3779B1
PRIME64_1 = 0x9E3779B185EBCA87
AVALANCHE = 0x165667919E3779F9
_FIRST = (
    0xC2B2AE3D,
    PRIME64_1,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    PRIME32_1,
)
_KEYS_AT = range(0, 192, 8)  # of stripe s, lane i: word s + i; of a scramble: words 16 to 23
_LAST_AT = range(121, 185, 8)  # of the last stripe of all
_MERGE_AT = range(11, 75, 8)


class Leaves:
    """Leaves of runs of bytes that stay where they are. Made once, computed as often as their bytes change.

    Args:
        runs: contiguous tensors on one device.
    """

    def __init__(self, runs: Sequence[torch.Tensor]) -> None:
        self._runs = [_bytes_of(run) for run in runs]
        self.sizes_bytes = [run.numel() for run in self._runs]
        self._odd: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device = self._runs[0].device if self._runs else torch.device("cpu")
        self._in_words = [self._whole_words(run) for run in self._runs] if self._device.type != "cpu" else []
        self._table: torch.Tensor | None = None

    @property
    def asynchronous(self) -> bool:
        """Whether `compute` comes back before the device is done."""
        return self._device.type != "cpu"

    def compute(self) -> torch.Tensor:
        """Their digests now, int64, on the device; not waited for."""
        if self._device.type == "cpu":
            return torch.from_numpy(self._on_cpu().view(np.int64))
        for odd, filled in self._odd:
            filled[: odd.numel()].copy_(odd)
        if find_spec("triton") is None:
            return by_torch(self._in_words)
        return self._by_triton()

    def digests(self) -> list[int]:
        """Digest of each run now."""
        return folded(self.compute(), self.sizes_bytes)

    def _on_cpu(self) -> Digests:
        return np.concatenate([np.empty(0, np.uint64), *(leaves_of(run.numpy()) for run in self._runs)])

    def _whole_words(self, run: torch.Tensor) -> torch.Tensor:
        """The run, or a place for a copy of it that begins and ends with a word."""
        if not run.data_ptr() % _WORD_BYTES and not run.numel() % _WORD_BYTES:
            return run
        filled = torch.zeros(-(-run.numel() // _WORD_BYTES) * _WORD_BYTES, dtype=torch.uint8, device=run.device)
        self._odd.append((run, filled))
        return filled

    def _by_triton(self) -> torch.Tensor:
        from ckpt_core.leaf_kernel import launch

        if self._table is None:
            self._table = torch.from_numpy(_table(self._in_words)).to(self._device)
        with torch.cuda.device(self._device):
            return launch(self._table, constants(self._device))


def folded(leaves: torch.Tensor, sizes_bytes: Sequence[int]) -> list[int]:
    """Digests of runs by those of their leaves; waits for the device."""
    return fold_each(leaves.cpu().numpy().view(np.uint64), sizes_bytes)


def _table(runs: Sequence[torch.Tensor]) -> np.typing.NDArray[np.int64]:
    """Address and words of each leaf."""
    counts = [leaf_count(run.numel()) for run in runs]
    number = np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in counts)])
    address = np.repeat(np.array([run.data_ptr() for run in runs], np.int64), counts) + number * LEAF_BYTES
    left = np.repeat(np.array([run.numel() for run in runs], np.int64), counts) - number * LEAF_BYTES
    return np.stack([address, np.minimum(left, LEAF_BYTES) // _WORD_BYTES], axis=1)


def by_torch(runs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Digests of the leaves of runs (uint8, whole words), int64, without triton."""
    found = [leaf for run in runs for leaf in _leaves_of(run)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _leaves_of(run: torch.Tensor) -> Iterator[torch.Tensor]:
    whole = run.numel() // LEAF_BYTES * LEAF_BYTES
    for first in range(0, whole, _LEAVES_AT_ONCE * LEAF_BYTES):
        yield _of_equal_size(run[first : min(whole, first + _LEAVES_AT_ONCE * LEAF_BYTES)].view(-1, LEAF_BYTES))
    if rest := run.numel() - whole:
        filled = torch.zeros(1, -(-rest // FILL_BYTES) * FILL_BYTES, dtype=torch.uint8, device=run.device)
        filled[0, :rest] = run[whole:]
        yield _of_equal_size(filled)


def _of_equal_size(leaves: torch.Tensor) -> torch.Tensor:
    size = leaves.shape[1]
    blocks = leaves.view(torch.int64).view(len(leaves), -1, _STRIPES, _LANES)
    words = constants(leaves.device)
    keys = torch.stack([words[stripe : stripe + _LANES] for stripe in range(_STRIPES)])
    sums = words[40:48].expand(len(leaves), _LANES)
    for number in range(blocks.shape[1]):
        last = number + 1 == blocks.shape[1]
        if last:
            keys = torch.cat([keys[:-1], words[24:32][None]])
        block = blocks[:, number]
        mixed = block ^ keys
        swapped = block.view(len(leaves), _STRIPES, -1, 2).flip(-1).reshape(block.shape)
        sums = sums + ((mixed & _LOW) * shifted_right(mixed, 32) + swapped).sum(1)
        if not last:
            sums = (sums ^ shifted_right(sums, 47) ^ words[16:24]) * PRIME32_1
    merged = sums ^ words[32:40]
    found = _signed(size * PRIME64_1 % (1 << 64)) + _folded(merged[:, ::2], merged[:, 1::2]).sum(1)
    found = (found ^ shifted_right(found, 37)) * AVALANCHE
    return found ^ shifted_right(found, 32)


_LOW = (1 << 32) - 1


def _folded(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Product of 128 bits, its halves xored."""
    a, b, c, d = first & _LOW, shifted_right(first, 32), second & _LOW, shifted_right(second, 32)
    low, cross, other = a * c, a * d, b * c
    carry = shifted_right(shifted_right(low, 32) + (cross & _LOW) + (other & _LOW), 32)
    return (first * second) ^ (b * d + shifted_right(cross, 32) + shifted_right(other, 32) + carry)


@functools.cache
def constants(device: torch.device) -> torch.Tensor:
    """Secret words for stripes and scrambles (24), the last stripe (8) and the merge (8); first sums (8), two primes; int64."""
    places = [*_KEYS_AT, *_LAST_AT, *_MERGE_AT]
    words = [int.from_bytes(_SECRET[at : at + _WORD_BYTES], "little") for at in places]
    words += [*_FIRST, PRIME64_1, AVALANCHE]
    return torch.tensor([_signed(word) for word in words], dtype=torch.int64, device=device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _bytes_of(run: torch.Tensor) -> torch.Tensor:
    assert run.is_contiguous(), "runs are contiguous"
    flat = run.detach().reshape(-1)
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
