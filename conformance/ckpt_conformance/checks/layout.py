"""What a rank says that it needs of a checkpoint, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.harness import NotOffered
from ckpt_conformance.levels import ModelKind
from ckpt_core.layout import Layout, check_coverage

_ALL_KINDS = tuple(ModelKind)


@check(
    "layout_touches_nothing",
    kinds=(ModelKind.PLAIN, ModelKind.QUANTISED),
    rule="ckpt_supports and ckpt_layout leave every bit and address of the live weights as they were.",
    usual_cause="A layout found by running the loader on the live parameters.",
)
def layout_touches_nothing(bench: Bench) -> None:
    """On a worker with real weights, which an update can be begun on afterwards."""
    worker = bench.worker_on(1)
    bits, addresses = bench.bits(worker), bench.addresses(worker)
    bench.hook.ckpt_supports(worker=worker)
    _layout(bench, worker, bench.checkpoint(2).tensors)
    bench.expect_bits(worker, bits, "the weights before the layout")
    if bench.addresses(worker) != addresses:
        raise CheckFailed(expected="the addresses before the layout", got="others", rank=bench.rank(worker))
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.abort()


@check(
    "layout_fits",
    kinds=_ALL_KINDS,
    rule="The layout of a checkpoint that the engine can start from names no problem, and slices inside its tensors.",
    usual_cause="Shapes of the sharded or padded parameter compared with those of the checkpoint.",
)
def layout_fits(bench: Bench) -> None:
    """By the same function as the session."""
    worker = bench.worker()
    manifest = bench.checkpoint(1).manifest
    layout = bench.hook.ckpt_layout(worker=worker, manifest=manifest)
    if layout is None:
        raise NotOffered("a layout: every tensor comes whole")
    check_coverage({bench.rank(worker): layout}, manifest=manifest)
    if not layout.entries:
        raise CheckFailed(expected="some slices", got="none", rank=bench.rank(worker))


@check(
    "layout_pure",
    kinds=_ALL_KINDS,
    rule="ckpt_layout says the same of the same manifest each time: asked again, after an update, and of another instance.",
    usual_cause="An order out of a set or a dict of objects, or what the last update left behind.",
)
def layout_pure(bench: Bench) -> None:
    """Plans are agreed by their digest: every rank must come to the same."""
    worker, other, tensors = bench.worker(), bench.worker(), bench.checkpoint(1).tensors
    first = _layout(bench, worker, tensors)
    again = {"asked again": _layout(bench, worker, tensors), "of another instance": _layout(bench, other, tensors)}
    bench.update(worker, 1)
    again["after an update"] = _layout(bench, worker, tensors)
    for when, layout in again.items():
        if layout != first:
            name, got = next(_differences(first, layout), ("", "another order"))
            raise CheckFailed(expected="the same layout as before", got=f"{got}, {when}", tensor=name)


@check(
    "layout_names_missing",
    rule="The layout names every tensor that the engine needs and the checkpoint lacks.",
    usual_cause="Only what the checkpoint has is looked at.",
)
def layout_names_missing(bench: Bench) -> None:
    """Each tensor in turn is left out of the manifest."""
    worker, tensors = bench.worker(), bench.checkpoint(1).tensors
    needed = {entry.tensor for entry in _layout(bench, worker, tensors).entries}
    for name in _some(needed):
        layout = _layout(bench, worker, {key: value for key, value in tensors.items() if key != name})
        _expect(bench, worker, layout.missing, name, "among the missing")


@check(
    "layout_names_unknown",
    rule="The layout names every tensor of the checkpoint that the engine does not know.",
    usual_cause="Names matched by suffix or pattern, or unknown ones passed over.",
)
def layout_names_unknown(bench: Bench) -> None:
    """A name that no engine knows, and one that looks like a known one."""
    worker, tensors = bench.worker(), bench.checkpoint(1).tensors
    for name in ("conformance.unknown.weight", f"{next(iter(tensors))}.unknown"):
        layout = _layout(bench, worker, {**tensors, name: torch.zeros(3)})
        _expect(bench, worker, layout.unknown, name, "among the unknown")


@check(
    "layout_names_mismatched",
    rule="The layout names every tensor of the wrong shape or dtype, with what was expected and what was got.",
    usual_cause="Only the number of elements is compared, or the dtype is left to an implicit cast.",
)
def layout_names_mismatched(bench: Bench) -> None:
    """One row more, another dtype of the same size, the same number of elements in another shape."""
    worker, tensors = bench.worker(), bench.checkpoint(1).tensors
    for name in _some({entry.tensor for entry in _layout(bench, worker, tensors).entries}):
        for wrong in misfits(tensors[name]):
            layout = _layout(bench, worker, {**tensors, name: wrong})
            found = tuple(mismatch.tensor for mismatch in layout.mismatched)
            _expect(bench, worker, found, name, f"mismatched, as {wrong.dtype} {list(wrong.shape)}")


def misfits(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Variants of a tensor that fit no parameter that it fits."""
    rows = torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor.reshape(1)
    other = torch.float16 if tensor.dtype != torch.float16 else torch.bfloat16
    return rows, tensor.reshape(1, *tensor.shape), tensor.to(other)


def _layout(bench: Bench, worker: Any, tensors: Mapping[str, torch.Tensor]) -> Layout:
    layout: Layout | None = bench.hook.ckpt_layout(worker=worker, manifest=bench.store.manifest_of(tensors))
    if layout is None:
        raise NotOffered("a layout: every tensor comes whole")
    return layout


def _differences(one: Layout, other: Layout) -> Iterator[tuple[str, str]]:
    """Name, and what another layout has there."""
    for mine, its in zip_longest(one.entries, other.entries):
        if mine != its:
            yield (mine or its).tensor, str(its)


def _some(names: set[str]) -> list[str]:
    """A few of them, spread over the model."""
    ordered = sorted(names)
    return ordered[:: max(1, len(ordered) // 6)]


def _expect(bench: Bench, worker: Any, found: tuple[str, ...], name: str, where: str) -> None:
    if name not in found:
        raise CheckFailed(expected=where, got=f"{list(found)[:8]}", tensor=name, rank=bench.rank(worker))
