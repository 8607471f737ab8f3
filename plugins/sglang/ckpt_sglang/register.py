"""What SGLang calls in each of its processes (entry point `sglang.srt.plugins`): our hooks, where they belong."""

from __future__ import annotations

import logging

from ckpt_sglang import compat

_log = logging.getLogger(__name__)


def register() -> None:
    """Register hooks for the process this runs in. A place that this SGLang lacks is an error: half a guard is none."""
    compat.warn_of_other_versions()
    role = compat.role_of_this_process()
    if role in ("scheduler", "main"):
        _register_scheduler()
    if role == "main":
        _register_main()


def _register_scheduler() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ckpt_sglang import attachment

    around = {
        compat.UPDATE_FROM_IPC: attachment.around_update_from_ipc,
        compat.PULL_REQUESTS: attachment.around_pull_requests,
        compat.FORWARD: attachment.around_forward,
        compat.RELEASE_MEMORY: attachment.around_release_memory,
        compat.INTERNAL_STATE: attachment.around_internal_state,
    }
    for path in (*around, compat.SCHEDULER_INIT):
        compat.require(path)
    for path, hook in around.items():
        HookRegistry.register(path, hook, HookType.AROUND)
    HookRegistry.register(compat.SCHEDULER_INIT, attachment.after_scheduler_init, HookType.AFTER)


def _register_main() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ckpt_sglang import front

    for path in (compat.TOKENIZER_INIT, compat.TOKENIZER_CONTINUE, compat.TOKENIZER_UPDATE):
        compat.require(path)
    HookRegistry.register(compat.TOKENIZER_INIT, front.after_tokenizer_init, HookType.AFTER)
    HookRegistry.register(compat.TOKENIZER_CONTINUE, front.around_continue, HookType.AROUND)
    HookRegistry.register(compat.TOKENIZER_UPDATE, front.around_update, HookType.AROUND)
