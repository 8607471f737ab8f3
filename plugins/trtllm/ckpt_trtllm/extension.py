"""`ray_worker_extension_cls="ckpt_trtllm.extension.CkptWorkerExtension"`: TensorRT-LLM mixes this class into its worker.

`WaitingWorkerExtension` is the same for an engine that is started with `load_format="dummy"` and must not serve before its first
weights are committed.

The classes are made when they are asked for: where TensorRT-LLM is installed they have its own extension as a base, so that
`update_weights`, `wait_for_engine_idle` (which `AsyncLLM.pause_generation` calls) and the like stay there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ckpt_trtllm import compat
from ckpt_trtllm.calls import RankCalls, WaitingRankCalls

_KINDS: Mapping[str, type[RankCalls]] = {
    "CkptWorkerExtension": RankCalls,
    "WaitingWorkerExtension": WaitingRankCalls,
}


def __getattr__(name: str) -> type[Any]:
    if name not in _KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(_KINDS)}")
    return _extension(name)


@cache
def _extension(name: str) -> type[Any]:
    native = compat.native_extension()
    bases = (_KINDS[name],) if native is None else (_KINDS[name], native)
    return type(name, bases, {"__module__": __name__, "__doc__": _KINDS[name].__doc__})
