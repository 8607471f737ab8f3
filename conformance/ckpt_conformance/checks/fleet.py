"""Engines that come and go between updates, and one that is slower than the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import check
from ckpt_conformance.checks.updates import updater_of
from ckpt_conformance.levels import Tier
from ckpt_core.apply import Applier
from ckpt_core.plan import Step

_SLOW_S = 1.5


@check(
    "membership_change",
    tier=Tier.GROUP,
    rule="An engine can be updated by another controller than before, with others than before, and by itself again.",
    usual_cause="What the first attach call brought along is kept: an address, a rank, a number of ranks.",
)
def membership_change(bench: Bench) -> None:
    """One engine; it and another; the other alone. Each time by a new controller."""
    first, joiner = bench.worker(), bench.worker()
    with updater_of(bench, [first]) as updater:
        updater.update(bench.checkpoint(1).path, version="one")
    bench.expect_fresh(first, bench.checkpoint(1))
    with updater_of(bench, [joiner, first]) as updater:
        updater.update(bench.checkpoint(2).path, version="two")
    for worker in (first, joiner):
        bench.expect_fresh(worker, bench.checkpoint(2))
    with updater_of(bench, [joiner]) as updater:
        updater.update(bench.checkpoint(1).path, version="one")
    bench.expect_fresh(joiner, bench.checkpoint(1))
    bench.expect_fresh(first, bench.checkpoint(2))


@check(
    "slow_rank",
    tier=Tier.GROUP,
    rule="A rank that is slow is waited for, within the deadlines of the update: it and the others get all they need.",
    usual_cause="A deadline of the engine's or the plugin's own, between hooks.",
)
def slow_rank(bench: Bench) -> None:
    """One of two does nothing for a while between begin and its first bucket."""
    workers = [bench.worker(), bench.worker()]
    with updater_of(bench, workers) as updater, _one_is_slow():
        updater.update(bench.checkpoint(1).path)
    for worker in workers:
        bench.expect_fresh(worker, bench.checkpoint(1))


@contextmanager
def _one_is_slow() -> Iterator[None]:
    """The core's side of the first rank that gets a bucket sleeps: what the others see of a slow engine."""
    original, slow = Applier.consume, list[Applier]()

    def consume(applier: Applier, step: Step) -> None:
        if not slow:
            slow.append(applier)
            time.sleep(_SLOW_S)
        original(applier, step)

    with patch.object(Applier, "consume", consume):
        yield
