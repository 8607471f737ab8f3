"""The rate limit of reads, on a clock that the test turns."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_core.errors import ConfigError
from ckpt_core.p2p.rate import TokenBucket


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bucket(rate: float = 100.0, burst: int = 50) -> tuple[TokenBucket, FakeClock]:
    clock = FakeClock()
    return TokenBucket(rate, burst_bytes=burst, clock=clock), clock


def test_a_burst_goes_at_once_and_then_the_rate_holds() -> None:
    limit, clock = bucket()
    assert [limit.take(size) for size in (20, 30, 0)] == [0, 0, 0]
    assert limit.take(50) == pytest.approx(0.5)
    assert limit.take(10) == pytest.approx(0.6)  # behind the one that waits
    clock.now += 0.6
    assert limit.take(10) == pytest.approx(0.1)


def test_no_more_than_a_burst_is_saved() -> None:
    limit, clock = bucket()
    clock.now += 3600
    assert (limit.take(50), limit.take(1)) == (0, pytest.approx(0.01))


def test_a_clock_that_steps_back_earns_nothing() -> None:
    limit, clock = bucket()
    limit.take(50)
    clock.now -= 10
    assert limit.take(10) == pytest.approx(0.1)
    clock.now += 10
    assert limit.take(10) == pytest.approx(0.2)


@pytest.mark.parametrize("size", [-1, 51])
def test_a_read_larger_than_the_burst_is_refused(size: int) -> None:
    limit, _ = bucket()
    with pytest.raises(ConfigError, match=f"expected 0 to 50 bytes .* got {size}; cut it"):
        limit.take(size)
    assert limit.take(50) == 0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (float("inf"), 1), (float("nan"), 1), (1, 0)])
def test_a_limit_that_lets_nothing_through_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ConfigError, match=r"expected .*, got"):
        TokenBucket(rate, burst_bytes=burst)


@given(
    st.floats(1, 1e11),
    st.integers(1, 1 << 32),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=30),
)
def test_over_any_window_the_rate_and_one_burst_get_through(
    rate: float, burst: int, steps: list[tuple[float, float]]
) -> None:
    limit, clock = bucket(rate, burst)
    let_through = []
    for pause, share in steps:
        clock.now += pause * burst / rate
        size = int(share * burst)
        let_through.append((clock.now + limit.take(size), size))
    times = [at for at, _ in let_through]
    assert times == sorted(times)
    room = 1e-9 * burst + rate * 1e-9 * (1 + clock.now)  # of floating point
    for first, last in itertools.combinations_with_replacement(range(len(steps)), 2):
        size = sum(size for _, size in let_through[first : last + 1])
        assert size <= rate * (times[last] - times[first]) + burst + room


@given(st.lists(st.integers(0, 50), max_size=30))
def test_who_waits_as_told_loses_nothing_of_the_rate(sizes: list[int]) -> None:
    limit, clock = bucket()
    for size in sizes:
        clock.now += limit.take(size)
    assert clock.now - 1000.0 == pytest.approx(max(0.0, sum(sizes) - 50) / 100.0)
