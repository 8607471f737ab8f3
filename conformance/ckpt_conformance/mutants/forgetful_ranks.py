"""The reference's plugin for rank processes that forget what an abort found, and whose guard is never armed."""

from ckpt_conformance.reference import plugin
from ckpt_conformance.reference.plugin import *  # noqa: F403 all other hooks are what they are
from ckpt_conformance.reference.worker import Worker
from ckpt_core.contract import AbortOutcome, Update
from ckpt_core.hookspecs import hookimpl


@hookimpl  # type: ignore[no-redef]
def ckpt_abort(worker: Worker, update: Update, cause: str) -> AbortOutcome:
    """The right word, and no mark."""
    outcome = plugin.ckpt_abort(worker, update, cause)
    worker.mixed_cause = None
    return outcome


@hookimpl  # type: ignore[no-redef]
def ckpt_poison(worker: Worker, cause: str | None) -> None:
    """Only disarm."""
    if cause is None:
        plugin.ckpt_poison(worker, None)
