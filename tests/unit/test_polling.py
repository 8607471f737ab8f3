"""Waiting on a number: at once where it is there, until a deadline where it never comes."""

import itertools
import time

import pytest

from ckpt_core.errors import TransferTimeout
from ckpt_core.polling import Poller


def nothing():
    """No reason to end."""


def poller(check=nothing, timeout_s=10.0):
    return Poller(
        check=check, deadline=time.monotonic() + timeout_s, expired=lambda what: TransferTimeout(f"waited for {what}")
    )


def test_what_is_there_costs_no_wait():
    waiter = poller(timeout_s=-1.0)  # not even the deadline is looked at
    waiter.until(lambda: True, "nothing")
    assert waiter.waited_s == 0.0


@pytest.mark.parametrize("calls", [2, 10, 100, 300])
def test_what_comes_later_is_seen(calls):
    seen = []
    waiter = poller()
    waiter.until(lambda: seen.append(1) or len(seen) >= calls, "the last call")
    assert len(seen) == calls
    assert 0.0 < waiter.waited_s < 10.0


def test_the_deadline_ends_the_wait_with_its_error():
    waiter = poller(timeout_s=0.05)
    start = time.monotonic()
    with pytest.raises(TransferTimeout, match="waited for a slot"):
        waiter.until(lambda: False, "a slot")
    assert 0.05 <= time.monotonic() - start < 5.0
    assert waiter.waited_s >= 0.05


def test_the_check_may_end_the_wait():
    def lost():
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        poller(lost).until(lambda: False, "a slot")


def test_the_check_is_called_now_and_then_only():
    calls = []
    waiter = poller(lambda: calls.append(time.monotonic()), timeout_s=0.2)
    with pytest.raises(TransferTimeout):
        waiter.until(lambda: False, "a slot")
    assert 2 <= len(calls) <= 41
    assert all(later - earlier >= 0.004 for earlier, later in itertools.pairwise(calls))


def test_busy_loops_meet_the_deadline_too():
    waiter = poller(timeout_s=-1.0)
    with pytest.raises(TransferTimeout, match="waited for bucket 3"):
        waiter.check_now_and_then("bucket 3")
    waiter.check_now_and_then("bucket 4")  # a moment later: not looked at again


def test_waits_add_up():
    waiter = poller(timeout_s=0.02)
    for _ in range(2):
        with pytest.raises(TransferTimeout):
            waiter.until(lambda: False, "a slot")
    assert waiter.waited_s >= 0.02
