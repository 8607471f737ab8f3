"""What SGLang calls in each of its processes (entry point `sglang.srt.plugins`): our hooks, where they belong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckpt_sglang import compat


def register() -> None:
    """Register hooks for the process this runs in: all or none, half a guard would be worse than none.

    Raises:
        EngineError: this SGLang lacks a place that is hooked into; SGLang logs it and starts without the plugin.
    """
    compat.warn_of_other_versions()
    role = compat.role_of_this_process()
    around: dict[str, Callable[..., Any]] = {}
    after: dict[str, Callable[..., Any]] = {}
    if role in ("scheduler", "main"):
        _add_scheduler(around, after)
    if role == "main":
        _add_front(around, after)
    for path in (*around, *after):
        compat.require(path)
    _register(around, after)


def _add_scheduler(around: dict[str, Callable[..., Any]], after: dict[str, Callable[..., Any]]) -> None:
    from ckpt_sglang import attachment

    around |= {
        compat.UPDATE_FROM_IPC: attachment.around_update_from_ipc,
        compat.PULL_REQUESTS: attachment.around_pull_requests,
        compat.FORWARD: attachment.around_forward,
        compat.RELEASE_MEMORY: attachment.around_release_memory,
        compat.INTERNAL_STATE: attachment.around_internal_state,
    }
    after[compat.SCHEDULER_INIT] = attachment.after_scheduler_init


def _add_front(around: dict[str, Callable[..., Any]], after: dict[str, Callable[..., Any]]) -> None:
    from ckpt_sglang import front

    around |= {
        compat.TOKENIZER_CONTINUE: front.around_continue,
        compat.TOKENIZER_UPDATE: front.around_update,
    }
    after[compat.TOKENIZER_INIT] = front.after_tokenizer_init


def _register(around: Mapping[str, Callable[..., Any]], after: Mapping[str, Callable[..., Any]]) -> None:
    if not around and not after:
        return  # a process without weights and without requests
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for path, hook in around.items():
        HookRegistry.register(path, hook, HookType.AROUND)
    for path, hook in after.items():
        HookRegistry.register(path, hook, HookType.AFTER)
