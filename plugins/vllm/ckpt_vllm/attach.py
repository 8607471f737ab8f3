"""Where an update enters a rank: from the worker extension and from the weight-transfer engine alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

ENGINE = "vllm"
FACTS_KEY = "engine"
_log = logging.getLogger("vllm.ckpt")  # below vLLM's own logger, whose handler shows it


def attach(worker: Any, rendezvous: Mapping[str, Any], engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Take part in an update; blocks until it is over. Never raises: that would desynchronise vLLM's RPC for good.

    Args:
        worker: vLLM's worker.
        rendezvous: fields of `ckpt_core.contract.Rendezvous`.
        engine: what the engine core knows, see EngineFacts; None where nobody told.

    Returns:
        fields of `AttachResult`.
    """
    try:
        from ckpt_core.contract import Rendezvous
        from ckpt_core.worker import attach as attach_rank
        from ckpt_vllm.adapter import adapter_of
        from ckpt_vllm.facts import EngineFacts

        adapter = adapter_of(worker)
        if engine is not None:
            known = EngineFacts.from_json(engine)
            adapter.facts = lambda: known
        result = asdict(attach_rank(adapter, Rendezvous(**rendezvous), engine=ENGINE))
        result["details"] = {"way": adapter.choice.way.value, "reason": adapter.choice.reason} if adapter.choice else {}
        return result
    except Exception as error:  # noqa: BLE001 told in the answer
        _log.exception("attach failed")
        return {"rank": -1, "outcome": "untouched", "error": f"{type(error).__name__}: {error}", "details": {}}


def import_receiver() -> None:
    """Load what an update will need."""
    import ckpt_core.worker  # noqa: F401
    from ckpt_core import plugins

    plugins.load(ENGINE)


def rank_status(worker: Any) -> dict[str, Any]:
    """Status of a rank, see `CkptWorker.status`. Never raises."""
    try:
        from ckpt_vllm.adapter import adapter_of

        return adapter_of(worker).status()
    except Exception as error:  # noqa: BLE001 told in the answer
        _log.exception("no status")
        return {"rank": -1, "error": f"{type(error).__name__}: {error}"}


def arm_rank(worker: Any, cause: str) -> str:
    """Arm the guard of a rank. Never raises; returns what went wrong, or nothing."""
    try:
        from ckpt_vllm.adapter import adapter_of

        adapter_of(worker).set_poison(cause)
    except Exception as error:  # noqa: BLE001 told in the answer
        _log.exception("the guard could not be armed")
        return f"{type(error).__name__}: {error}"
    return ""
