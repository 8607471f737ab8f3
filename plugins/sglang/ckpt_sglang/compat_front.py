"""The second half of `compat`: the process that takes requests, which is not the scheduler's."""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from typing import Any

from ckpt_core.errors import EngineUnavailable
from ckpt_sglang import compat


def http_module() -> Any:
    """SGLang's HTTP server, where this process runs it."""
    return sys.modules.get(compat.HTTP_SERVER)


def conflict(text: str) -> Exception:
    """An error that SGLang's routes answer as 409."""
    from fastapi import HTTPException

    error: Exception = HTTPException(status_code=409, detail=text)
    return error


def requests() -> Any:
    """SGLang's module of requests, for control inside the engine's process.

    Raises:
        EngineUnavailable: SGLang is not installed here.
    """
    try:
        return import_module("sglang.srt.managers.io_struct")
    except ImportError as error:
        raise EngineUnavailable(f"SGLang cannot be imported here: {error}") from error


def continue_request() -> Any:
    """A resume. Giving cached device memory back would only delay it."""
    kind = requests().ContinueGenerationReqInput
    return kind(torch_empty_cache=False) if "torch_empty_cache" in fields_of(kind) else kind()


def fields_of(kind: type) -> tuple[str, ...]:
    """Names of the fields of a message class, whichever library made it."""
    return tuple(getattr(kind, "__struct_fields__", ())) or tuple(getattr(kind, "__dataclass_fields__", ()))


def is_starting(manager: Any) -> bool:
    """Whether the server is not up yet; an engine without a server is as soon as it exists."""
    state = getattr(http_module(), "_global_state", None)
    if state is None or state.tokenizer_manager is not manager:
        return False
    return str(getattr(manager.server_status, "name", "")) == "Starting"


def flushes_with_waiting() -> bool:
    """Whether a paused scheduler drops its caches while requests wait (0.5.17 refuses, after the weights are new)."""
    kind = getattr(sys.modules.get(compat.SCHEDULER), "Scheduler", None)
    return kind is None or "ignore_waiting" in signature(kind.is_fully_idle).parameters


def note_version(manager: Any, version_: str) -> None:
    """The version that answers of the tokenizer manager name; the scheduler's is recorded at the commit."""
    manager._update_weight_version_if_provided(version_)


def served_version(manager: Any, recorded: str) -> str:
    """The version that is served, where the scheduler recorded that one.

    Where schedulers cannot be told of a version (0.5.17), theirs is that of our last commit, and SGLang's own updates are
    known to the tokenizer manager only.
    """
    return recorded if _tells_scheduler(manager) else str(manager.config_value("weight_version"))


async def name_version(manager: Any, version_: str) -> None:
    """Call the weights that are there by another name, in scheduler and tokenizer manager."""
    if not _tells_scheduler(manager):
        note_version(manager, version_)
        return
    # aborting is its default: requests that were retracted or frozen must live
    request = requests().UpdateWeightVersionReqInput(new_version=version_, abort_all_requests=False)
    await manager.update_weight_version(request)


def _tells_scheduler(manager: Any) -> bool:
    return hasattr(manager, "update_weight_version")


def admin_route(function: Any) -> Any:
    """Mark a route as one that needs the admin key, where the server has one."""
    try:
        from sglang.srt.utils.auth import AuthLevel, auth_level
    except ImportError:
        return function
    return auth_level(AuthLevel.ADMIN_OPTIONAL)(function)
