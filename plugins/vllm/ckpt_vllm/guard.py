"""No token from weights that are not known to be any one checkpoint, whoever resumes vLLM.

Four small patches, put in by the general plugin (or the worker extension) in every process of vLLM that imports it:

* `EngineCore.pause_scheduler` counts the requests that it meets.
* `EngineCore.resume_scheduler` asks every rank first, and refuses while one is poisoned: a client's POST /resume gets an error
  and the server lives on, paused. A wake that would resume leaves it paused.
* `EngineCore.collective_rpc` tells our attach call whether the scheduler is paused, which workers do not know; answers
  `ckpt_status` and `ckpt_digests`; and pauses the scheduler itself where an update left mixed weights.
* `Worker.execute_model` raises while its rank is poisoned. That ends the engine: it is the last line, behind the other two.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from ckpt_core.errors import EngineStateError
from ckpt_vllm import compat
from ckpt_vllm.adapter import adapter_of
from ckpt_vllm.attach import FACTS_KEY, arm_rank, attach, import_receiver, rank_status
from ckpt_vllm.digests import rank_digests
from ckpt_vllm.facts import EngineFacts

_log = logging.getLogger("vllm.ckpt")  # below vLLM's own logger, whose handler shows it
_MARK = "_ckpt_patched"
_MET = "_ckpt_met"
_WAITING = "vLLM was started to wait for its first weights, and none have been committed"
ATTACH, STATUS, DIGESTS, NATIVE = "ckpt_attach", "ckpt_status", "ckpt_digests", "update_weights"


def install() -> None:
    """Patch vLLM in this process; a second call changes nothing."""
    core, worker = compat.engine_core_class(), compat.worker_class()
    if getattr(core, _MARK, False):
        return
    setattr(core, _MARK, True)
    core.__init__ = _then_prepared(core.__init__)
    for serving in compat.serving_core_classes():
        # there the plugin is loaded in the middle of __init__: too late to patch that
        serving.run_busy_loop = _prepared_first(serving.run_busy_loop)
    for kind in (core, *compat.serving_core_classes()):
        if "pause_scheduler" in vars(kind):
            kind.pause_scheduler = _counted_pause(kind.pause_scheduler)
    core.resume_scheduler = _guarded_resume(core.resume_scheduler)
    core.wake_up = _guarded_wake(core.wake_up)
    core.collective_rpc = _informed_rpc(core.collective_rpc)
    worker.load_model = _bound(worker.load_model)
    worker.execute_model = _last_line(worker.execute_model)


# -- in the engine core ------------------------------------------------------------------------------------------------
def facts_of(core: Any) -> EngineFacts:
    """What an engine core knows now."""
    asleep, weights_asleep = compat.sleep_of(core)
    return EngineFacts(
        known=True,
        paused=bool(core.is_scheduler_paused()),
        asleep=asleep,
        weights_asleep=weights_asleep,
        unfinished=compat.unfinished_in(core),
        met=getattr(core, _MET, None),
        version=compat.weight_version_of(core),
    )


def poison_of(core: Any) -> str:
    """Why some rank may not produce tokens; empty where all may."""
    found = [status for status in _statuses(core) if status.get("poison")]
    return f"rank {found[0]['rank']}: {found[0]['poison']}" if found else ""


def _statuses(core: Any) -> list[dict[str, Any]]:
    """Of all ranks; the function travels by its name."""
    return list(core.model_executor.collective_rpc(rank_status))


def _then_prepared(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(core: Any, *args: Any, **kwargs: Any) -> None:
        original(core, *args, **kwargs)
        _prepare(core)

    return start


def _prepared_first(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def run_busy_loop(core: Any) -> None:
        _prepare(core)
        original(core)

    return run_busy_loop


def _prepare(core: Any) -> None:
    """Once, before the first step: a worker in this process can ask for facts itself; one that waits for weights is paused."""
    if getattr(core, "_ckpt_prepared", False):
        return
    core._ckpt_prepared = True
    if (worker := compat.worker_in_process(core)) is not None:
        here = weakref.ref(core)
        adapter_of(worker).facts = lambda: _facts_or_none(here())
    options = (getattr(core.vllm_config, "additional_config", None) or {}).get("ckpt", {})
    if options.get("wait_for_weights"):
        if failed := [text for text in core.model_executor.collective_rpc(arm_rank, args=(_WAITING,)) if text]:
            raise EngineStateError(f"vLLM cannot wait for weights, its guard was not armed: {failed[0]}")
        compat.pause_now(core)


def _facts_or_none(core: Any | None) -> EngineFacts:
    return EngineFacts() if core is None else facts_of(core)


def _counted_pause(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pause_scheduler(core: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(core, _MET, compat.unfinished_in(core))
        return original(core, *args, **kwargs)

    return pause_scheduler


def _guarded_resume(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resume_scheduler(core: Any) -> Any:
        if cause := poison_of(core):
            if getattr(core, "_ckpt_waking", False):
                _log.warning("awake, but it stays paused: %s", cause)
                compat.pause_now(core)
                return None
            raise EngineStateError(
                f"refused to resume, the weights are not those of any one checkpoint ({cause}); update again"
            )
        return original(core)

    return resume_scheduler


def _guarded_wake(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wake_up(core: Any, *args: Any, **kwargs: Any) -> Any:
        core._ckpt_waking = True
        try:
            return original(core, *args, **kwargs)
        finally:
            core._ckpt_waking = False

    return wake_up


def _informed_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collective_rpc(
        core: Any, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if method == STATUS:
            facts = facts_of(core).to_json()
            return [{**status, FACTS_KEY: facts} for status in _statuses(core)]
        if method == DIGESTS:
            return core.model_executor.collective_rpc(rank_digests)
        entering = _with_facts(core, method, kwargs)
        if entering is None:
            return original(core, method, timeout, args, kwargs)
        try:
            # the function travels by its name: no worker extension is needed. No timeout: a late answer would stay in
            # vLLM's queue, and be taken for that to a later call
            return original(core, attach if method == ATTACH else method, None, args, entering)
        finally:
            _pause_if_poisoned(core)

    return collective_rpc


def _with_facts(core: Any, method: Any, kwargs: Any) -> dict[str, Any] | None:
    """The call's arguments and what is known here; None where the call is none of ours."""
    if not isinstance(kwargs, dict):
        return None
    if method == ATTACH:
        return {**kwargs, FACTS_KEY: facts_of(core).to_json()}
    info = kwargs.get("update_info")
    if method == NATIVE and isinstance(info, dict) and "rendezvous" in info:
        return {**kwargs, "update_info": {**info, FACTS_KEY: facts_of(core).to_json()}}
    return None


def _pause_if_poisoned(core: Any) -> None:
    if (cause := poison_of(core)) and not core.is_scheduler_paused():
        _log.error("paused: %s", cause)
        compat.pause_now(core)


# -- in each worker ----------------------------------------------------------------------------------------------------
def _bound(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(worker, *args, **kwargs)
        import_receiver()  # now, and not within the pause of the first update
        engine = getattr(worker, "weight_transfer_engine", None)
        if hasattr(engine, "ckpt_worker"):
            engine.ckpt_worker = worker
        return result

    return load_model


def _last_line(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = compat.adapter_on(worker)
        if adapter is not None and adapter.poison and _has_tokens(*args, **kwargs):
            raise EngineStateError(f"rank {worker.rank} produces no token: {adapter.poison}")
        return original(worker, *args, **kwargs)

    return execute_model


def _has_tokens(scheduler_output: Any, *_args: Any, **_kwargs: Any) -> bool:
    """Whether a step computes anything: a paused engine steps without tokens when a waiting request is given up."""
    return bool(getattr(scheduler_output, "total_num_scheduled_tokens", 1))
