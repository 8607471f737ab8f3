"""Looks at live weights from outside: fingerprints, and comparisons with a version. They prove what an engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.checkpoints import Checkpoint
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import updater_of
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import Level, ModelKind, Tier
from ckpt_core.api import Updater
from ckpt_core.capability import Capability
from ckpt_core.errors import VerificationError

_KINDS = (ModelKind.PLAIN, ModelKind.QUANTISED)


@check(
    "fingerprint_follows_content",
    level=Level.VERIFIED,
    tier=Tier.GROUP,
    kinds=_KINDS,
    needs=(Capability.LIVE_READ,),
    rule="The fingerprint of what lives is the same for the same checkpoint, another for another, and alike on all instances.",
    usual_cause="ckpt_live shows what was there at the first call, or leaves out what is derived.",
)
def fingerprint_follows_content(bench: Bench) -> None:
    """Two instances, to A, to B and to A again."""
    workers = [bench.worker(), bench.worker()]
    with updater_of(bench, workers) as updater:
        first, other, again = (_fingerprints(updater, bench, seed) for seed in (1, 2, 1))
    for expected, got, what in (
        (first[:1] * 2, first, "the same on both instances"),
        (first, again, "the same for the same checkpoint"),
    ):
        if got != expected or not all(got):
            raise CheckFailed(expected=f"fingerprints {expected}: {what}", got=str(got))
    if first[0] == other[0]:
        raise CheckFailed(expected=f"another fingerprint than {first[0]} for another checkpoint", got="the same")


@check(
    "wrong_joiner_found",
    level=Level.VERIFIED,
    tier=Tier.GROUP,
    needs=(Capability.RECORDED_LAYOUT, Capability.LIVE_READ),
    rule="An engine that joins with other weights than it says is found out by a look, by the name of a tensor.",
    usual_cause="What is compared is not what serves: ckpt_recording_target shows another model than the live one.",
)
def wrong_joiner_found(bench: Bench) -> None:
    """One runs A, as all believe of the other, which runs B; then both run A, and one element of one is changed."""
    member, joiner = bench.worker_on(1), bench.worker_on(2)
    with updater_of(bench, [member, joiner]) as updater:
        if not _comparable(bench, member, updater):
            raise NotOffered("weights that live as they are in the checkpoint")
        _expect_refused(updater, bench, joiner)
        bench.expect_fresh(joiner, bench.checkpoint(2))
        updater.update(bench.checkpoint(1).path, version="A")
        if not updater.verify("A").equal:
            raise CheckFailed(expected="both equal to version A after an update to it", got="a difference")
        name, changed = _as_in(bench.checkpoint(1), bench.harness.live(joiner))
        changed[(0,) * changed.dim()] += 1
        looks = updater.verify("A").engines
        if not looks[0].equal or looks[1].equal:
            got = f"equal: {[look.equal for look in looks]}"
            raise CheckFailed(expected="a difference on the second engine only", got=got, tensor=name)


def _as_in(checkpoint: Checkpoint, live: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """A live tensor that is one of the checkpoint's: what is derived or converted may be compared with nothing."""
    for name, tensor in live.items():
        if any(_same(tensor, given) for given in checkpoint.tensors.values()):
            return name, tensor
    raise NotOffered("live tensors as they are in the checkpoint")


def _same(live: torch.Tensor, given: torch.Tensor) -> bool:
    return live.dtype == given.dtype and live.shape == given.shape and torch.equal(live.cpu(), given)


def _fingerprints(updater: Updater, bench: Bench, seed: int) -> list[str]:
    return [rank.fingerprint for rank in updater.update(bench.checkpoint(seed).path, version=f"v{seed}").ranks]


def _comparable(bench: Bench, worker: Any, updater: Updater) -> bool:
    """Whether the engine's live weights can be compared with a checkpoint at all."""
    target = bench.hook.ckpt_recording_target(worker=worker)
    return target is not None and not target.excluded


def _expect_refused(updater: Updater, bench: Bench, joiner: Any) -> None:
    try:
        updater.adopt(bench.checkpoint(1).path, version="A")
    except VerificationError as error:
        if not any(name in str(error) for name in bench.checkpoint(1).tensors):
            raise CheckFailed(expected="an error that names a tensor", got=str(error)) from None
        return
    raise CheckFailed(
        expected="VerificationError for an engine with other weights", got="it was adopted", rank=bench.rank(joiner)
    )
