"""SGLang's hooks in its scheduler processes: an update comes in, the guard stands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from ckpt_core import worker
from ckpt_core.contract import Rendezvous
from ckpt_sglang import compat
from ckpt_sglang.rank import SglangRank

_log = logging.getLogger(__name__)
KEY = "ckpt"  # of the rendezvous, in zmq_handles of /update_weights_from_ipc
COMMITTED = "committed"
_ATTRIBUTE = "_ckpt_rank"
_by_receiver: dict[int, SglangRank] = {}
_by_runner: dict[int, SglangRank] = {}


def rank_of(scheduler: Any) -> SglangRank:
    """The adapter of a scheduler: one for its whole life."""
    found: SglangRank = getattr(scheduler, _ATTRIBUTE)
    return found


def forget(scheduler: Any) -> None:
    """Let go of a scheduler that has ended, in a process that outlives it."""
    _by_receiver.pop(id(scheduler.request_receiver), None)
    for _, runner in compat.runners(scheduler):
        _by_runner.pop(id(runner), None)


def after_scheduler_init(_result: None, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """A scheduler is up: give it its adapter."""
    rank = SglangRank(scheduler)
    setattr(scheduler, _ATTRIBUTE, rank)
    _by_receiver[id(scheduler.request_receiver)] = rank
    for _, runner in compat.runners(scheduler):
        _by_runner[id(runner)] = rank


def around_update_from_ipc(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Take part in an update that carries our rendezvous; leave others to SGLang."""
    rank = rank_of(manager.scheduler)
    carried = request.zmq_handles.get(KEY)
    if carried is None:
        return _foreign(original, manager, request, rank)
    rank.guard.board.look_again()
    try:
        rendezvous = msgspec.json.decode(carried, type=Rendezvous)
    except msgspec.DecodeError as error:
        return compat.ipc_answer(success=False, message=f"ckpt: not a rendezvous of this version: {error}")
    result = worker.attach(rank, rendezvous, engine="sglang")
    if result.outcome != COMMITTED:
        message = f"ckpt: rank {result.rank} of update {rendezvous.update_id} ended {result.outcome}: {result.error}"
        return compat.ipc_answer(success=False, message=message)
    return compat.ipc_answer(success=True, message=f"ckpt: update {rendezvous.update_id} is committed")


def _foreign(original: Callable[..., Any], manager: Any, request: Any, rank: SglangRank) -> Any:
    answer = original(manager, request)
    if answer.success and not rank.guard.poison:
        rank.guard.first_weights()
    return answer


def around_pull_requests(original: Callable[..., Any], receiver: Any) -> Any:
    """What comes in from outside, before other ranks see it."""
    requests = original(receiver)
    rank = _by_receiver.get(id(receiver))
    if not requests or rank is None or rank.rank != 0:  # later pipeline stages get what the first let through
        return requests
    return rank.gate.passed(requests)


def around_forward(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """The last line of the guard."""
    rank = _by_runner.get(id(runner))
    if rank is not None:
        rank.guard.check()
    return original(runner, *args, **kwargs)


def around_release_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Weights whose memory is given back come back without contents: guarded until an update commits."""
    answer = original(manager, request)
    if compat.weights_are_released(manager.scheduler) and compat.contents_go_with_memory():
        rank_of(manager.scheduler).guard.arm("the memory of the weights was released: their contents are gone")
    return answer


def around_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """SGLang's report of its state, with ours under a key of its own."""
    answer = original(scheduler, request)
    rank = rank_of(scheduler)
    reason = rank.guard.board.reason()
    answer.internal_state[KEY] = {
        "instance_id": rank.instance_id,
        "world_size": rank.world_size,
        "device_kind": rank.device.type,
        "version": compat.weight_version(),
        "asleep": compat.weights_are_released(scheduler),
        "waiting": rank.guard.waiting,
        "refuses": reason,
        "poisoned": bool(rank.guard.poison) or (bool(reason) and not rank.guard.waiting),
        "paused": compat.is_paused(scheduler),
    }
    return answer
