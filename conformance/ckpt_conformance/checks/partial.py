"""Updates of a part of the model, and groups that must land together."""

from __future__ import annotations

from collections import Counter

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import check
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import ModelKind
from ckpt_core.capability import Capability
from ckpt_core.layout import LayoutEntry, whole_layout

_KINDS = (ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.QUANTISED)


@check(
    "partial_update",
    kinds=_KINDS,
    needs=(Capability.PARTIAL_UPDATE,),
    rule="A partial update writes what it brings and leaves the rest: the result is a fresh start on the mixture.",
    usual_cause="Post-processing that runs over modules of which nothing arrived.",
)
def partial_update(bench: Bench) -> None:
    """One group of several tensors."""
    worker = bench.worker_on(1)
    names = [entry.tensor for entry in _largest_group(bench)]
    bench.attempt(worker, 2, names=names).run()
    bench.expect_fresh(worker, bench.store.mixture(bench.checkpoint(1), bench.checkpoint(2), names))


@check(
    "group_lands_together",
    kinds=_KINDS,
    needs=(Capability.PARTIAL_UPDATE,),
    rule="A group of which only some tensors arrive is refused, or lands exactly as a fresh start on the mixture would.",
    usual_cause="A fused parameter quantised or repacked with one part of it new and the others empty.",
)
def group_lands_together(bench: Bench) -> None:
    """The first tensor of a group without the others."""
    worker = bench.worker_on(1)
    names = [_largest_group(bench)[0].tensor]
    attempt = bench.attempt(worker, 2, names=names)
    try:
        attempt.run()
    except Exception:  # noqa: BLE001 refused
        attempt.abort()
        return
    bench.expect_fresh(worker, bench.store.mixture(bench.checkpoint(1), bench.checkpoint(2), names))


def _largest_group(bench: Bench) -> list[LayoutEntry]:
    manifest = bench.checkpoint(1).manifest
    layout = bench.hook.ckpt_layout(worker=bench.worker(), manifest=manifest) or whole_layout(manifest)
    group, size = Counter(entry.group for entry in layout.entries if entry.group).most_common(1)[0]
    if size == 1:
        raise NotOffered("a model with a group of several tensors")
    return [entry for entry in layout.entries if entry.group == group]
