"""The suite itself: every mutant is failed by its own check and by no surplus ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ckpt_conformance.checks.registry import load_all
from ckpt_conformance.mutants.catalogue import MUTANTS, Mutant, run_mutant

pytestmark = pytest.mark.timeout(300)  # servers of two ranks, on a busy machine


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught_by_its_own_check(mutant: Mutant) -> None:
    verdict = run_mutant(mutant)
    assert verdict.ok, verdict.text


def test_mutants_name_checks_that_exist() -> None:
    known = {check.check_id for check in load_all()}
    named = {mutant.caught_by for mutant in MUTANTS}.union(*(mutant.also for mutant in MUTANTS))
    assert named <= known
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_every_check_is_needed_by_a_mutant() -> None:
    """A check that catches no bug of its own is questioned."""
    assert {check.check_id for check in load_all()} == {mutant.caught_by for mutant in MUTANTS}
