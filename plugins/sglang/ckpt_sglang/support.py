"""What SGLang, or this plugin, cannot update in place: refused before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_core.errors import EngineStateError
from ckpt_sglang import compat

if TYPE_CHECKING:
    from ckpt_sglang.rank import SglangRank


def check_supported(rank: SglangRank) -> None:
    """Raise where this engine cannot be updated now, or ever.

    Raises:
        EngineStateError: with the reason, SGLang's own where it has one.
    """
    rank.check_state()
    compat.check_topology()
    if (mode := compat.weight_cache_mode()) != "off":
        raise EngineStateError(
            f"--weight-cache-mode {mode}: the weights are shared with other engines and must not be written; start with off"
        )
    if what := compat.not_updatable(rank.scheduler):
        raise EngineStateError(f"SGLang {compat.engine_version()} cannot update {what}; use a later version")
    for role, runner in compat.runners(rank.scheduler):
        if reason := compat.derived_cache_error(runner.model):
            raise EngineStateError(f"SGLang refuses to update the {role} model while it runs: {reason}")
