"""Which version the engine says it runs."""

from __future__ import annotations

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.endpoints import endpoint_of
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.updates import updater_of
from ckpt_conformance.levels import Level, Tier
from ckpt_core.capability import Capability


@check(
    "version_told",
    tier=Tier.GROUP,
    needs=(Capability.LIVE_VERSION,),
    rule="After a commit ckpt_ready tells the version that was committed.",
    usual_cause="The version is set where the update begins, or nowhere.",
)
def version_told(bench: Bench) -> None:
    """A label of our own."""
    worker = bench.worker()
    with updater_of(bench, [worker]) as updater:
        updater.update(bench.checkpoint(1).path, version="conformance-7")
    if (version := bench.hook.ckpt_ready(endpoint=endpoint_of(bench, worker)).version) != "conformance-7":
        raise CheckFailed(expected="version 'conformance-7'", got=repr(version), rank=bench.rank(worker))


@check(
    "version_at_commit",
    level=Level.TRANSACTIONAL,
    needs=(Capability.LIVE_VERSION,),
    rule="A version is published at commit only: until then, and after an abort, ckpt_ready does not tell it.",
    usual_cause="The label is set where the update begins, or where it finishes.",
)
def version_at_commit(bench: Bench) -> None:
    """Asked after every hook of an update that is aborted at the end."""
    worker = bench.worker_on(1)
    endpoint, attempt = endpoint_of(bench, worker), bench.attempt(worker, 2)
    for step in (attempt.begin, attempt.load_all, attempt.finish, attempt.abort):
        step()
        if bench.hook.ckpt_ready(endpoint=endpoint).version == attempt.update.version:
            raise CheckFailed(
                expected=f"another version than {attempt.update.version!r}, which is not committed",
                got=f"just that after ckpt_{step.__name__}",
                rank=bench.rank(worker),
            )
