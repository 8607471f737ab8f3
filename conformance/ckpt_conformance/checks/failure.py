"""Raising is the only way to report a failure: what fails below a hook comes out of the hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.attempt import Attempt, device_of
from ckpt_conformance.checks.expect import must_raise
from ckpt_conformance.checks.registry import check
from ckpt_conformance.levels import ModelKind
from ckpt_core.contract import LoadBucket, LoadTensor

_KINDS = (ModelKind.PLAIN, ModelKind.QUANTISED)


class InjectedFault(RuntimeError):
    """Raised on purpose below the plugin."""


class ExplodingTensor(torch.Tensor):
    """Has a shape and a dtype like any other; whoever reads its values gets an InjectedFault."""

    @staticmethod
    def __new__(cls: type[ExplodingTensor], like: torch.Tensor, device: torch.device) -> ExplodingTensor:
        """Of the shape and dtype of a tensor."""
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> NoReturn:
        """Any operation."""
        raise InjectedFault(f"injected into the engine's loader at {func}")


def exploding_bucket(bench: Bench, worker: Any, attempt: Attempt) -> LoadBucket:
    """The second bucket of an update, with nothing in it but a tensor that cannot be read."""
    name, tensor, box = attempt.batches[1][0]
    with torch.no_grad():
        broken = ExplodingTensor(tensor, device_of(bench.plugin, worker))
    return LoadBucket(index=1, tensors=(LoadTensor(name=name, tensor=broken, box=box),))


@check(
    "load_failure_surfaces",
    kinds=_KINDS,
    rule="An error in the engine's loader comes out of ckpt_load: it is never caught and logged.",
    usual_cause="`except Exception: logger.exception(...)` around the loader.",
)
def load_failure_surfaces(bench: Bench) -> None:
    """A tensor that cannot be read, in the second bucket."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load(0)
    bucket = exploding_bucket(bench, worker, attempt)
    with must_raise("ckpt_load whose loader fails", tensor=bucket.tensors[0].name, rank=bench.rank(worker)):
        attempt.load_bucket(bucket)
    attempt.abort()


@check(
    "finish_failure_surfaces",
    kinds=_KINDS,
    rule="An error in the engine's post-processing comes out of ckpt_finish: it is never caught and logged.",
    usual_cause="`except Exception: logger.exception(...)`, or an RPC whose result nobody looks at.",
)
def finish_failure_surfaces(bench: Bench) -> None:
    """Injected below the plugin, by the harness."""
    worker = bench.worker_on(1)
    attempt = bench.attempt(worker, 2)
    attempt.begin()
    attempt.load_all()
    error = InjectedFault("injected into the engine's post-processing")
    with (
        bench.harness.failing_finish(worker, error),
        must_raise("ckpt_finish whose post-processing fails", rank=bench.rank(worker)),
    ):
        attempt.finish()
    attempt.abort()
