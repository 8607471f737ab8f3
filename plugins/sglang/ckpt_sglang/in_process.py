"""For users who run `sglang.Engine` in their own process: the engine as a target of an update.

    from ckpt_core import Updater
    from ckpt_sglang.in_process import target

    engine = sglang.Engine(model_path=..., load_format="dummy")
    with Updater([target(engine)]) as updater:
        updater.update(checkpoint, version="step-100")

Means the same as for a server: requests are paused, every rank loads and verifies, caches are flushed, and the engine serves the
new version, or it refuses tokens until an update succeeds. Code that runs the engine in an event loop of its own
(`async_generate`) calls `update` from another thread: `await asyncio.to_thread(updater.update, checkpoint)`.
"""

from __future__ import annotations

from typing import Any

from ckpt_core.api import Target
from ckpt_core.errors import ConfigError
from ckpt_sglang.control import ENGINE


def target(engine: Any, *, label: str = "") -> Target:
    """An `sglang.Engine` as a target.

    Args:
        engine: of this process.
        label: how reports name it.

    Raises:
        ConfigError: it is something else, or an engine that was shut down.
    """
    if getattr(engine, "tokenizer_manager", None) is None:
        raise ConfigError(f"expected an sglang.Engine that runs, got {engine!r}")
    return Target(engine=ENGINE, url=label or f"in-process-{id(engine):x}", handle=engine)
