"""A server whose update was cut off in the middle: it stays silent, whoever resumes it, until an update mends it."""

from __future__ import annotations

from ckpt_conformance.bench import NEW_TOKENS, PROMPT, Bench
from ckpt_conformance.checks.interruption import Interruption
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.checks.server import answer_of, compare
from ckpt_conformance.checks.updates import failure_of, updater
from ckpt_conformance.harness import NotOffered, Server
from ckpt_conformance.levels import Level, Tier
from ckpt_core.capability import Capability
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import CkptError, Outcome, UpdateAborted

_RANKS = 2


@check(
    "resume_while_poisoned",
    level=Level.TRANSACTIONAL,
    tier=Tier.SERVER,
    needs=(Capability.POISON_GUARD, Capability.RELOADABLE_ABORT),
    rule="A server with mixed weights produces no token, whoever resumes it; an update mends it without a restart.",
    usual_cause="The ranks forget what an abort found, or the resume route asks only the scheduler.",
)
def resume_while_poisoned(bench: Bench) -> None:
    """An agent is killed when a rank of two has loaded something; then a client resumes the server."""
    interruption = Interruption()
    with (
        bench.harness.server(bench.checkpoint(1).path, ranks=_RANKS, dummy=False) as server,
        updater(
            bench, [server.target], ring_bytes=1 << 16, bucket_bytes=1 << 14, on_progress=interruption.on_progress
        ) as updating,
    ):
        usual = answer_of(server)
        with interruption.of(updating):
            error = failure_of(updating, bench.checkpoint(2).path)
        _expect_poisoned(error)
        _resume_anyway(bench, server)
        _expect_no_token(server)
        updating.update(bench.checkpoint(1).path)
        compare(usual, answer_of(server))


def _expect_poisoned(error: CkptError) -> None:
    outcome = error.outcome if isinstance(error, UpdateAborted) else None
    if outcome is Outcome.CLEAN:
        raise NotOffered("an update that can be cut off in the middle: nothing was written yet")
    if outcome is not Outcome.POISONED:
        raise CheckFailed(expected="outcome poisoned", got=str(error))


def _resume_anyway(bench: Bench, server: Server) -> None:
    """As any client might. It may be refused."""
    endpoint = Endpoint(url=server.target.url, engine=server.target.engine, handle=server.target.handle)
    try:
        bench.hook.ckpt_resume(endpoint=endpoint, version=None)
    except CkptError:
        return
    finally:
        endpoint.close()


def _expect_no_token(server: Server) -> None:
    try:
        tokens = server.generate(PROMPT, NEW_TOKENS)
    except NotOffered:
        raise
    except Exception:  # noqa: BLE001 how a server refuses is its own matter
        return
    if tokens:
        raise CheckFailed(expected="no token from mixed weights", got=str(tokens))
