"""Who a rank is."""

from __future__ import annotations

import os
from dataclasses import fields
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import RankInfo

_OTHERS = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "6", "TP_RANK": "5", "TP_SIZE": "6"}


@check(
    "identify_stable",
    rule="ckpt_identify says the same before and after an update, and another instance for another start of the engine.",
    usual_cause="An id made anew at each call, or a fixed one.",
)
def identify_stable(bench: Bench) -> None:
    """Before, during and after."""
    worker, other = bench.worker(), bench.worker()
    first = bench.hook.ckpt_identify(worker=worker)
    bench.update(worker, 1)
    again = bench.hook.ckpt_identify(worker=worker)
    if first != again:
        raise CheckFailed(expected=f"the same as before the update: {first}", got=str(again))
    if not 0 <= first.rank < first.world_size:
        raise CheckFailed(expected=f"a rank below {first.world_size}", got=str(first.rank))
    if bench.hook.ckpt_identify(worker=other).instance_id == first.instance_id:
        raise CheckFailed(expected="another instance_id for another instance", got=repr(first.instance_id))


@check(
    "identify_by_itself",
    kinds=(ModelKind.PLAIN, ModelKind.SHARDED),
    rule="ckpt_identify tells the engine's own rank, whatever the environment of the process says; rank 0 is a rank, too.",
    usual_cause="`rank or int(os.environ[...])`.",
)
def identify_by_itself(bench: Bench) -> None:
    """With the variables of a launcher that counts otherwise."""
    worker = bench.worker()
    expected = _places(bench.hook.ckpt_identify(worker=worker))
    with patch.dict(os.environ, _OTHERS):
        got = _places(bench.hook.ckpt_identify(worker=worker))
    if got != expected:
        raise CheckFailed(expected=str(expected), got=f"{got}, with {_OTHERS}", rank=bench.rank(worker))


def _places(info: RankInfo) -> dict[str, int]:
    """Rank and size in each kind of parallelism."""
    names = [field.name for field in fields(info) if field.name.endswith(("rank", "_size"))]
    return {name: getattr(info, name) for name in names}
