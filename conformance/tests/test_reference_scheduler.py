"""Scheduler, version spans and prefix cache: logic without processes."""

from __future__ import annotations

import pytest
import torch

from ckpt_conformance.reference.kv_cache import BLOCK_TOKENS, CacheShape, PrefixCache, SequenceCache, block_keys
from ckpt_conformance.reference.requests import Event, FinishReason, Request, VersionSpan, version_spans
from ckpt_conformance.reference.scheduler import Scheduler
from ckpt_core.contract import PauseMode
from ckpt_core.errors import EngineStateError


def make_request(request_id: int, events: list[Event] | None = None, max_tokens: int = 3) -> Request:
    return Request(
        request_id=request_id,
        prompt=(7, 8),
        max_tokens=max_tokens,
        eos_token_ids=frozenset({1}),
        emit=(events if events is not None else []).append,
    )


def make_scheduler(*requests: Request, max_running: int = 2) -> Scheduler:
    scheduler = Scheduler(max_running=max_running, max_waiting=4)
    for request in requests:
        scheduler.add(request)
    return scheduler


def step(scheduler: Scheduler, token_id: int = 5, version: str = "v1") -> list[int]:
    ids = [item.sequence_id for item in scheduler.next_items()]
    scheduler.take(dict.fromkeys(ids, token_id), version)
    return ids


def test_requests_run_in_order_of_arrival_and_free_their_place() -> None:
    scheduler = make_scheduler(*(make_request(i, max_tokens=i) for i in (1, 2, 3)))
    assert [step(scheduler) for _ in range(5)] == [[1, 2], [2, 3], [3], [3], []]
    assert scheduler.take_freed() == [1, 2, 3]
    assert scheduler.take_freed() == []


def test_first_item_is_the_prompt_then_single_tokens() -> None:
    scheduler = make_scheduler(make_request(1))
    (first,) = scheduler.next_items()
    assert (first.token_ids, first.prefill) == ([7, 8], True)
    scheduler.take({1: 5}, "v1")
    (second,) = scheduler.next_items()
    assert (second.token_ids, second.prefill) == ([5], False)


def test_end_token_stops_and_length_ends() -> None:
    events: list[Event] = []
    scheduler = make_scheduler(make_request(1, events), make_request(2, events))
    scheduler.next_items()
    scheduler.take({1: 1, 2: 5}, "v1")
    while scheduler.has_work:
        step(scheduler)
    assert [event.finish for event in events if event.finish] == [FinishReason.STOP, FinishReason.LENGTH]


def test_pause_abort_ends_everything_and_later_requests_queue() -> None:
    events: list[Event] = []
    scheduler = make_scheduler(*(make_request(i, events) for i in (1, 2, 3)))
    step(scheduler)
    scheduler.pause(PauseMode.ABORT)
    assert [event.finish for event in events if event.finish] == [FinishReason.ABORT] * 3
    scheduler.add(make_request(4))
    assert scheduler.stopped
    assert not scheduler.has_work
    assert scheduler.next_items() == []
    scheduler.resume()
    assert step(scheduler) == [4]


def test_pause_wait_finishes_what_runs_and_admits_nothing() -> None:
    scheduler = make_scheduler(*(make_request(i) for i in (1, 2, 3)))
    step(scheduler)
    scheduler.pause(PauseMode.WAIT)
    assert not scheduler.stopped
    assert [step(scheduler), step(scheduler)] == [[1, 2], [1, 2]]
    assert scheduler.stopped
    assert len(scheduler.waiting) == 1


def test_pause_keep_freezes_with_cache() -> None:
    scheduler = make_scheduler(make_request(1))
    step(scheduler)
    scheduler.pause(PauseMode.KEEP)
    assert scheduler.stopped
    assert scheduler.take_freed() == []
    with pytest.raises(EngineStateError, match="frozen"):
        scheduler.pause(PauseMode.WAIT)
    scheduler.resume()
    assert not scheduler.next_items()[0].prefill


def test_pause_retract_gives_up_the_cache_and_computes_again_in_order() -> None:
    scheduler = make_scheduler(*(make_request(i) for i in (1, 2, 3)))
    step(scheduler)
    scheduler.pause(PauseMode.RETRACT)
    assert sorted(scheduler.take_freed()) == [1, 2]
    assert not scheduler.running
    scheduler.resume()
    items = scheduler.next_items()
    assert [(item.sequence_id, item.token_ids, item.prefill) for item in items] == [
        (1, [7, 8, 5], True),
        (2, [7, 8, 5], True),
    ]


def test_cancelled_request_takes_no_token_of_the_step_in_progress() -> None:
    events: list[Event] = []
    scheduler = make_scheduler(make_request(1, events))
    scheduler.next_items()
    scheduler.cancel(1)
    scheduler.take({1: 5}, "v1")
    assert [event.finish for event in events] == [FinishReason.ABORT]
    scheduler.cancel(99)


def test_queue_has_a_limit() -> None:
    assert make_scheduler(*(make_request(i) for i in range(4))).full
    assert not make_scheduler(*(make_request(i) for i in range(3))).full


@pytest.mark.parametrize(
    ("versions", "spans"),
    [
        ("", []),
        ("a", [("a", 0, 1)]),
        ("aab", [("a", 0, 2), ("b", 2, 3)]),
        ("aba", [("a", 0, 1), ("b", 1, 2), ("a", 2, 3)]),
    ],
)
def test_version_spans_cover_each_token_once(versions: str, spans: list[tuple[str, int, int]]) -> None:
    expected = [VersionSpan(version=version, start=start, end=end) for version, start, end in spans]
    assert version_spans(list(versions)) == expected


def make_sequence(tokens: int) -> SequenceCache:
    shape = CacheShape(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu"))
    sequence = SequenceCache(shape, capacity=4)
    sequence.reserve(tokens)
    values = torch.arange(tokens * 2.0).view(1, tokens, 2)
    keys, _ = sequence.write(0, values, values)
    sequence.advance(tokens)
    assert torch.equal(keys, values)
    return sequence


def test_prefix_cache_gives_back_whole_blocks_and_leaves_a_token() -> None:
    cache = PrefixCache(8)
    prompt = list(range(2 * BLOCK_TOKENS))
    cache.store(prompt, make_sequence(len(prompt)))
    assert len(cache.match([*prompt, 99])) == 2
    assert len(cache.match(prompt)) == 1, "one token must be left to compute"
    assert len(cache.match([99, *prompt])) == 0
    block = cache.match(prompt)[0]
    assert torch.equal(block[0, 0, 0], torch.arange(2.0 * BLOCK_TOKENS).view(-1, 2))
    cache.flush()
    assert cache.match(prompt) == []


def test_prefix_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = PrefixCache(2)
    prompts = [[start] * (BLOCK_TOKENS + 1) for start in range(3)]
    for prompt in prompts[:2]:
        cache.store(prompt, make_sequence(len(prompt)))
    assert cache.match(prompts[0])
    cache.store(prompts[2], make_sequence(len(prompts[2])))
    assert len(cache) == 2
    assert [len(cache.match(prompt)) for prompt in prompts] == [1, 0, 1]


def test_block_keys_depend_on_all_tokens_before() -> None:
    first = list(block_keys([1] * BLOCK_TOKENS + [2] * BLOCK_TOKENS))
    second = list(block_keys([3] * BLOCK_TOKENS + [2] * BLOCK_TOKENS))
    assert len(first) == 2
    assert not set(first) & set(second)
