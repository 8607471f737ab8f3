"""Every mutant, the check that must catch it, and the checks that may fail beside it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from ckpt_conformance.mutants.listed_content import CONTENT_MUTANTS
from ckpt_conformance.mutants.listed_plugins import PLUGIN_MUTANTS
from ckpt_conformance.mutants.listed_servers import SERVER_MUTANTS
from ckpt_conformance.mutants.listed_states import STATE_MUTANTS
from ckpt_conformance.mutants.listed_updates import UPDATE_MUTANTS
from ckpt_conformance.mutants.mutant import Mutant, Verdict, run_mutant

__all__ = ["MUTANTS", "Mutant", "judged", "run_mutant"]

MUTANTS: tuple[Mutant, ...] = (
    *PLUGIN_MUTANTS,
    *CONTENT_MUTANTS,
    *STATE_MUTANTS,
    *UPDATE_MUTANTS,
    *SERVER_MUTANTS,
)


def judged() -> Iterator[tuple[Mutant, Verdict]]:
    """Run each mutant, as many at a time as there are processors; a thread each: their tensors are tiny."""
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from zip(MUTANTS, pool.map(_judge, range(len(MUTANTS))), strict=True)


def _judge(number: int) -> Verdict:
    return run_mutant(MUTANTS[number])
