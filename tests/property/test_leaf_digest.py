"""Digests of runs: the same on every device, by whatever road; any flipped, moved or swapped element is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_core.device_digest import Leaves, by_torch, folded
from ckpt_core.leaf_digest import LEAF_BYTES, fold, leaf_count, leaves_of, run_digest

LENGTHS = st.one_of(
    st.integers(0, 3000),
    st.sampled_from([LEAF_BYTES + by for by in (-8, -1, 0, 1, 8)]),
    st.integers(LEAF_BYTES, 3 * LEAF_BYTES),
)
DTYPES = st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64])


def run_of(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(0, 1 << 32))
def test_torch_alone_gives_what_the_library_gives(length: int, seed: int) -> None:
    words = run_of(length // 8 * 8, seed)
    assert by_torch([torch.from_numpy(words)]).numpy().view(np.uint64).tolist() == leaves_of(words).tolist()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(LENGTHS, st.integers(0, 9)), max_size=6))
def test_many_runs_at_once_give_what_each_gives(runs: list[tuple[int, int]]) -> None:
    made = [run_of(length, seed) for length, seed in runs]
    leaves = Leaves([torch.from_numpy(run) for run in made])
    assert leaves.digests() == [run_digest(run) for run in made]
    assert leaves.sizes_bytes == [run.size for run in made]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, count = draw(DTYPES), draw(st.one_of(st.integers(2, 200), st.integers(2, 70_000)))
    return torch.from_numpy(run_of(count * dtype.itemsize, draw(st.integers(0, 9)))).view(dtype)


def digest(tensor: torch.Tensor) -> int:
    return Leaves([tensor]).digests()[0]


@settings(deadline=None, max_examples=200)
@given(tensors(), st.data())
def test_a_flipped_bit_is_seen(tensor: torch.Tensor, data: st.DataObject) -> None:
    other = tensor.clone().view(torch.uint8)
    other[data.draw(st.integers(0, len(other) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(other) != digest(tensor)


@settings(deadline=None, max_examples=200)
@given(tensors(), st.data())
def test_two_swapped_elements_are_seen(tensor: torch.Tensor, data: st.DataObject) -> None:
    one, two = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    other = tensor.clone()
    other[one], other[two] = tensor[two], tensor[one]
    assert (digest(other) == digest(tensor)) == torch.equal(other, tensor)


@settings(deadline=None, max_examples=200)
@given(tensors(), st.data())
def test_a_moved_element_is_seen(tensor: torch.Tensor, data: st.DataObject) -> None:
    """Taken out of one place and put in at another; all between move by one."""
    one, two = (data.draw(st.integers(0, len(tensor) - 1)) for _ in range(2))
    rest = torch.cat([tensor[:one], tensor[one + 1 :]])
    other = torch.cat([rest[:two], tensor[one : one + 1], rest[two:]])
    assert (digest(other) == digest(tensor)) == torch.equal(other, tensor)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 5), st.data())
def test_swapped_leaves_are_seen(count: int, data: st.DataObject) -> None:
    run = run_of(count * LEAF_BYTES, 1).reshape(count, LEAF_BYTES)
    order = data.draw(st.permutations(range(count)))
    assert (run_digest(run[order].reshape(-1)) == run_digest(run.reshape(-1))) == (order == sorted(order))


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, LEAF_BYTES - 1, LEAF_BYTES])
def test_zeros_at_the_end_count(length: int) -> None:
    """A leaf is filled up with zeros: the length tells them from the run's own."""
    run = run_of(length, 3)
    assert run_digest(np.append(run, np.uint8(0))) != run_digest(run)


def test_digests_are_folded_by_runs() -> None:
    runs = [run_of(length, 5) for length in (0, 5, 2 * LEAF_BYTES + 1, LEAF_BYTES)]
    leaves = np.concatenate([leaves_of(run) for run in runs])
    assert folded(torch.from_numpy(leaves.view(np.int64)), [run.size for run in runs]) == [
        fold(leaves_of(run), run.size) for run in runs
    ]
    assert sum(leaf_count(run.size) for run in runs) == len(leaves)
