"""What the control side can call on every rank, by TensorRT-LLM's collective RPC.

No call raises: an error of one rank would hide the others' answers. They are in the answer, under `error`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, TypeAlias

ENGINE = "trtllm"
Answer: TypeAlias = dict[str, Any]
_log = logging.getLogger(__name__)


def _answered(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Errors become answers."""

    @functools.wraps(function)
    def answer(worker: Any, *args: Any, **kwargs: Any) -> Answer:
        try:
            return {"error": "", **function(worker, *args, **kwargs)}
        except Exception as error:  # noqa: BLE001 told in the answer
            _log.exception("%s failed", function.__name__)
            return {"error": f"{type(error).__name__}: {error}"}

    return answer


class RankCalls:
    """Mixed into the worker's class. TensorRT-LLM refuses names that its worker has, so all begin with `ckpt_`."""

    ckpt_waits_for_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """TensorRT-LLM derives the worker's class: from there on its engine is guarded as soon as it is set up."""
        super().__init_subclass__(**kwargs)
        set_up = getattr(cls, "setup_engine", None)
        if callable(set_up):
            cls.setup_engine = _then_guarded(set_up)  # type: ignore[attr-defined]

    @_answered
    def ckpt_status(self, instance_id: str = "") -> Answer:
        """What this rank holds and does; takes the instance's name where it has none."""
        from ckpt_trtllm.rank import rank_of

        rank = rank_of(self)
        rank.identity.tell(instance_id)
        info = rank.identity.info()
        return {
            "rank": rank.rank,
            "world_size": info.world_size,
            "instance_id": info.instance_id,
            "device_kind": info.device_kind.value,
            "device_uuid": info.device_uuid,
            "updating": rank.is_updating,
            "refuses": rank.guard.reason,
            "waiting": rank.guard.waiting and not (rank.guard.poison or rank.guard.uncommitted),
            "held": rank.hold.taken,
            "met": rank.met,
            "version": rank.version,
        }

    @_answered
    def ckpt_attach(self, rendezvous: Mapping[str, Any]) -> Answer:
        """Take part in an update; blocks until it is over on this rank."""
        from ckpt_core.contract import Rendezvous
        from ckpt_core.worker import attach
        from ckpt_trtllm.rank import rank_of

        result = attach(rank_of(self), Rendezvous(**rendezvous), engine=ENGINE, plugin=own_plugin())
        return {**asdict(result), "cause": result.error, "error": ""}

    @_answered
    def ckpt_pause(self) -> Answer:
        """Park the executor once its requests have finished."""
        from ckpt_trtllm import compat
        from ckpt_trtllm.rank import rank_of

        rank = rank_of(self)
        if not rank.hold.taken:
            rank.met = compat.in_flight(self)
            rank.hold.take()
        return {"met": rank.met}

    @_answered
    def ckpt_resume(self, version: str | None = None) -> Answer:
        """Let the executor go on, as that version where one is named; not from weights that may not serve."""
        from ckpt_trtllm.rank import rank_of

        rank = rank_of(self)
        rank.guard.check()
        rank.version = version or rank.version
        rank.hold.leave()
        return {}

    @_answered
    def ckpt_flush(self) -> Answer:
        """Drop what the executor keeps of prompts. Parked for it, where it is not."""
        from ckpt_trtllm.rank import rank_of

        rank = rank_of(self)
        parked = rank.hold.taken
        rank.hold.take()
        try:
            rank.worker.engine.reset_prefix_cache()
        finally:
            if not parked:
                rank.hold.leave()
        return {}

    @_answered
    def ckpt_abort(self, reason: str) -> Answer:
        """Another rank failed. May come in any state, and again."""
        from ckpt_trtllm.rank import rank_of

        rank_of(self).abort_natively(reason)
        return {}

    @_answered
    def ckpt_digests(self) -> Answer:
        """Digest of every live tensor, for tests."""
        from ckpt_trtllm.digests import digests_of
        from ckpt_trtllm.rank import rank_of

        return {"digests": digests_of(rank_of(self).live())}


class WaitingRankCalls(RankCalls):
    """The same, for an engine that is started with dummy weights: no token before the first commit."""

    ckpt_waits_for_weights = True


@functools.cache
def own_plugin() -> Any:
    """This plugin, whether or not it is installed under its name where the engine runs."""
    from ckpt_core.plugins import EnginePlugin
    from ckpt_trtllm import plugin

    return EnginePlugin(plugin, name=ENGINE)


def _then_guarded(set_up: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(set_up, "_ckpt_guarded"):
        return set_up

    @functools.wraps(set_up)
    def setup_engine(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = set_up(worker, *args, **kwargs)
        from ckpt_trtllm.rank import rank_of

        rank_of(worker).guard.waiting = bool(worker.ckpt_waits_for_weights)
        own_plugin()  # now, and not within the pause of the first update
        return result

    setup_engine._ckpt_guarded = True  # type: ignore[attr-defined]
    return setup_engine
