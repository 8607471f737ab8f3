"""Mutants whose server or ranks, as processes, have a bug."""

from __future__ import annotations

from ckpt_conformance.mutants.mutant import Mutant
from ckpt_conformance.mutants.serve import prefix

SERVER_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="first_rank_only",
        rank_plugin="ckpt_conformance.mutants.first_rank_only",
        caught_by="core.server_update",
    ),
    Mutant(name="flush_forgotten", server_prefix=prefix("flush_forgotten"), caught_by="core.server_update"),
    Mutant(name="abort_freezes", server_prefix=prefix("abort_freezes"), caught_by="core.in_flight_abort"),
    Mutant(name="wait_freezes", server_prefix=prefix("wait_freezes"), caught_by="core.in_flight_wait"),
    Mutant(name="keep_ends", server_prefix=prefix("keep_ends"), caught_by="core.in_flight_keep"),
    Mutant(
        name="version_of_the_first_token",
        server_prefix=prefix("version_of_the_first_token"),
        caught_by="core.in_flight_keep",
    ),
    Mutant(name="retract_keeps", server_prefix=prefix("retract_keeps"), caught_by="core.in_flight_retract"),
    Mutant(
        name="version_of_the_start",
        server_prefix=prefix("version_of_the_start"),
        caught_by="core.version_of_answers",
    ),
    Mutant(
        name="forgetful_ranks",
        rank_plugin="ckpt_conformance.mutants.forgetful_ranks",
        caught_by="transactional.resume_while_poisoned",
    ),
)
