"""Every mutant, the check that must catch it, and the checks that may fail beside it."""

from __future__ import annotations

from ckpt_conformance.mutants.listed_content import CONTENT_MUTANTS
from ckpt_conformance.mutants.listed_plugins import PLUGIN_MUTANTS
from ckpt_conformance.mutants.listed_servers import SERVER_MUTANTS
from ckpt_conformance.mutants.listed_states import STATE_MUTANTS
from ckpt_conformance.mutants.listed_updates import UPDATE_MUTANTS
from ckpt_conformance.mutants.mutant import Mutant, run_mutant

__all__ = ["MUTANTS", "Mutant", "run_mutant"]

MUTANTS: tuple[Mutant, ...] = (
    *PLUGIN_MUTANTS,
    *CONTENT_MUTANTS,
    *STATE_MUTANTS,
    *UPDATE_MUTANTS,
    *SERVER_MUTANTS,
)
