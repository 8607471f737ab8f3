"""The guard: what ranks know of each other, and what the gate lets through."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from ckpt_sglang import compat
from ckpt_sglang.guard import WAITING, Board, Gate, Guard


class Store:
    """A key-value store as torch.distributed has them."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


@dataclass
class Request:
    rid: str


class Batch(list):
    pass


class Resume:
    pass


class Control:
    pass


@pytest.fixture
def scheduler():
    return SimpleNamespace(_engine_paused=False)


@pytest.fixture
def refused(monkeypatch):
    monkeypatch.setattr(compat, "request_kinds", lambda: (Resume, (Request,), (Batch,)))
    monkeypatch.setattr(compat, "is_health_check", lambda request: request.rid.startswith("HEALTH"))
    found = []
    monkeypatch.setattr(
        compat, "abort_output", lambda scheduler, request, text, status: found.append((request.rid, status))
    )
    return found


def test_a_rank_sees_the_others_only_after_an_update_began():
    store = Store()
    first, second = (Board(store, rank=rank, world_size=2) for rank in range(2))
    second.write("mixed")
    assert first.reason() == "", "nothing can have changed since it last looked"
    first.look_again()
    assert first.reason() == "rank 1: mixed"
    second.write("")
    assert first.reason() == ""


def test_a_board_of_one_rank_needs_no_store():
    board = Board(None, rank=0, world_size=1)
    board.write("mixed")
    board.look_again()
    assert board.reason() == "mixed"


def test_an_armed_guard_pauses_the_scheduler_and_refuses_a_step(scheduler):
    guard = Guard(scheduler, Board(None, rank=0, world_size=1), waiting=False)
    guard.check()
    guard.arm("mixed")
    assert scheduler._engine_paused
    with pytest.raises(RuntimeError, match="mixed"):
        guard.check()
    guard.disarm()
    guard.check()
    assert not scheduler._engine_paused


def test_a_scheduler_that_somebody_else_paused_stays_paused(scheduler):
    scheduler._engine_paused = True
    guard = Guard(scheduler, Board(None, rank=0, world_size=1), waiting=False)
    guard.arm("mixed")
    guard.disarm()
    assert scheduler._engine_paused


def test_waiting_ends_with_the_first_weights_only(scheduler):
    guard = Guard(scheduler, Board(None, rank=0, world_size=1), waiting=True)
    guard.arm("mixed")
    guard.disarm()
    assert guard.own_reason == WAITING
    guard.first_weights()
    assert guard.own_reason == ""


def test_an_update_that_is_not_committed_is_a_reason(scheduler):
    guard = Guard(scheduler, Board(None, rank=0, world_size=1), waiting=False)
    guard.mark_updating("u1")
    assert "u1" in guard.own_reason
    guard.mark_updating("")
    assert guard.own_reason == ""


def test_the_gate_lets_everything_through_while_weights_are_whole(scheduler, refused):
    requests = [Request("a"), Resume(), Control()]
    assert Gate(scheduler, lambda: "").passed(requests) == requests
    assert refused == []


def test_the_gate_answers_requests_drops_resumes_and_hands_on_the_rest(scheduler, refused):
    control = Control()
    requests = [Request("a"), Resume(), Batch([Request("b"), Request("c")]), control]
    assert Gate(scheduler, lambda: "mixed").passed(requests) == [control]
    assert refused == [("a", 503), ("b", 503), ("c", 503)]


def test_a_health_check_gets_no_answer_since_any_would_count_as_health(scheduler, refused):
    assert Gate(scheduler, lambda: "mixed").passed([Request("HEALTH_1")]) == []
    assert refused == []
