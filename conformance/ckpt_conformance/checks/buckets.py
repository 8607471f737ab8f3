"""How a checkpoint is cut into buckets must not matter."""

from __future__ import annotations

import random
from itertools import groupby

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import check
from ckpt_conformance.levels import ModelKind
from ckpt_core.layout import LayoutEntry

_KINDS = (ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.QUANTISED)


@check(
    "any_bucket_size",
    kinds=_KINDS,
    rule="One tensor a bucket, some, or all in one bucket: the result is the same.",
    usual_cause="A module finalised per bucket and not when it is complete, or a last bucket that is never handled.",
)
def any_bucket_size(bench: Bench) -> None:
    """All compared with the coarsest cut."""
    worker = bench.worker()
    bench.update(worker, 1, tensors_per_bucket=0)
    whole = bench.bits(worker)
    for tensors_per_bucket in (1, 2, 7):
        bench.update(worker, 1, tensors_per_bucket=tensors_per_bucket)
        bench.expect_bits(worker, whole, "all tensors in one bucket")


@check(
    "any_order",
    kinds=_KINDS,
    rule="Groups may come in any order, and the tensors of a group too: the result is the same.",
    usual_cause="Shards appended as they come, or a parameter made complete by the name that is last in files.",
)
def any_order(bench: Bench) -> None:
    """Backwards, and shuffled."""
    worker = bench.worker_on(1)
    usual = bench.bits(worker)
    for arrange in (_backwards, _shuffled):
        bench.update(worker, 1, arrange=arrange)
        bench.expect_bits(worker, usual, "the usual order")


def _backwards(entries: list[LayoutEntry]) -> list[LayoutEntry]:
    return entries[::-1]


def _shuffled(entries: list[LayoutEntry]) -> list[LayoutEntry]:
    dice = random.Random(7)
    groups = [list(group) for _, group in groupby(entries, key=lambda entry: entry.group or entry.tensor)]
    dice.shuffle(groups)
    return [entry for group in groups for entry in dice.sample(group, len(group))]
