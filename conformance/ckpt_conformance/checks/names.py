"""Names that are unknown, missing, repeated or of the wrong shape are reported, never passed over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.attempt import Attempt
from ckpt_conformance.checks.expect import must_raise, spoil
from ckpt_conformance.checks.layout import misfits
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import LoadReport

_STRANGER = "conformance.unknown.weight"


@check(
    "report_accounts_for_all",
    kinds=(ModelKind.PLAIN, ModelKind.TIED, ModelKind.EXPERTS, ModelKind.QUANTISED),
    rule="Every LoadReport has each name of its bucket in loaded or in ignored, once, and no other name.",
    usual_cause="Names of parameters reported instead of names of the checkpoint.",
)
def report_accounts_for_all(bench: Bench) -> None:
    """Over one update."""
    worker = bench.worker()
    attempt = bench.attempt(worker, 1)
    attempt.begin()
    for batch, report in zip(attempt.batches, attempt.load_all(), strict=True):
        if not isinstance(report, LoadReport):
            raise CheckFailed(expected="a LoadReport", got=repr(report), rank=bench.rank(worker))
        sent, told = Counter({name for name, _, _ in batch}), Counter([*report.loaded, *report.ignored])
        if sent != told:
            name = next(iter((sent - told) + (told - sent)))
            got = f"{told[name]} times in the report of a bucket that has it {sent[name]} times"
            raise CheckFailed(expected="once for once", got=got, tensor=name, rank=bench.rank(worker))
    attempt.finish()


@check(
    "unknown_name_reported",
    rule="A tensor that the engine does not know makes ckpt_load raise, or is in ignored; it is never dropped in silence.",
    usual_cause="`if name not in params: continue` in a loader.",
)
def unknown_name_reported(bench: Bench) -> None:
    """A bucket with nothing else in it."""
    worker = bench.worker_on(1)
    before, attempt = bench.bits(worker), bench.attempt(worker, 2)
    attempt.begin()
    try:
        report = attempt.load_bucket(attempt.deliver([(_STRANGER, torch.zeros(3), None)]).bucket)
    except Exception:  # noqa: BLE001 any error reports it
        report = None
    if report is not None and report.ignored != (_STRANGER,):
        raise CheckFailed(
            expected="an error, or in ignored", got=str(report), tensor=_STRANGER, rank=bench.rank(worker)
        )
    bench.expect_bits(worker, before, "the weights before the unknown tensor")
    attempt.abort()


@check(
    "missing_name_reported",
    kinds=(ModelKind.PLAIN, ModelKind.EXPERTS, ModelKind.QUANTISED),
    rule="ckpt_finish raises where an expected tensor that the rank needs did not arrive.",
    usual_cause="Nobody counts; the parameter keeps its old values.",
)
def missing_name_reported(bench: Bench) -> None:
    """The last tensor of the update never comes."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    absent = attempt.batches[-1].pop()[0]
    attempt.begin()
    attempt.load_all()
    with must_raise("ckpt_finish without that tensor", tensor=absent, rank=bench.rank(worker)):
        attempt.finish()
    attempt.abort()


@check(
    "misfit_refused",
    kinds=(ModelKind.PLAIN, ModelKind.EXPERTS),
    rule="A tensor of the wrong shape or dtype is refused by the layout or by ckpt_load, and nothing is written.",
    usual_cause="copy_ broadcasts and casts.",
)
def misfit_refused(bench: Bench) -> None:
    """Of several tensors: one row more, one dimension more, another dtype."""
    worker = bench.worker_on(1)
    before, tensors = bench.bits(worker), bench.checkpoint(2).tensors
    names = [batch[0][0] for batch in bench.attempt(worker, 2).batches]
    for name in names[:: max(1, len(names) // 4)]:
        for wrong in misfits(tensors[name]):
            if not _layout_refuses(bench, worker, name, wrong):
                _expect_load_refuses(bench, worker, name, wrong)
            bench.expect_bits(worker, before, f"the weights before a wrong {name}")


@check(
    "repeated_tensor",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="A tensor that comes twice in one update is refused, or lands as if it had come once.",
    usual_cause="A count of arrivals that takes a module for complete too early.",
)
def repeated_tensor(bench: Bench) -> None:
    """The first bucket is sent again after the second."""
    usual = bench.bits(bench.worker_on(1))
    worker = bench.worker()
    spoil(bench.harness.live(worker))
    attempt = bench.attempt(worker, 1)
    attempt.batches.insert(2, attempt.batches[0])
    try:
        _run(attempt)
    except Exception:  # noqa: BLE001 any refusal will do
        attempt.abort()
        return
    bench.expect_bits(worker, usual, "an update without the repetition")


def _run(attempt: Attempt) -> None:
    attempt.begin()
    attempt.load_all()
    attempt.finish()
    attempt.commit()


def _layout_refuses(bench: Bench, worker: Any, name: str, wrong: torch.Tensor) -> bool:
    manifest = bench.store.manifest_of({**bench.checkpoint(2).tensors, name: wrong})
    layout = bench.hook.ckpt_layout(worker=worker, manifest=manifest)
    return layout is not None and any(mismatch.tensor == name for mismatch in layout.mismatched)


def _expect_load_refuses(bench: Bench, worker: Any, name: str, wrong: torch.Tensor) -> None:
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    with must_raise(f"ckpt_load of {wrong.dtype} {list(wrong.shape)}", tensor=name, rank=bench.rank(worker)):
        attempt.load_bucket(attempt.deliver([(name, wrong, None)]).bucket)
    attempt.abort()
