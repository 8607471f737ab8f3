"""One test for each cell of the fault matrix that can mean anything; see matrix.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules beside this file, in an interpreter that imports tests by path

import trial
from cases import CASES, GROUPS, Case, all_cells, not_applicable
from pool import running

Futures = dict[Case, Future[trial.Result]]


@pytest.fixture(scope="session")
def futures(request: pytest.FixtureRequest) -> Iterator[Futures]:
    """Results to come of all cells that were asked for."""
    asked = {item.callspec.params["case"] for item in request.session.items if "case" in _params(item)}
    with running([case for case in CASES if case in asked]) as futures:
        yield futures


def _params(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.integration
@pytest.mark.timeout(300)  # the engines of all stages start with the first cell
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_cell(case: Case, futures: Futures) -> None:
    result = futures[case].result()
    assert not result.violations, "\n".join([*result.violations, str(result.report), *map(str, result.found)])


def test_every_cell_is_run_or_says_why_not() -> None:
    cells = all_cells()
    assert len(cells) == len(set(cells)) == sum(len(group.points) * len(group.actors) * 3 for group in GROUPS)
    assert {cell for cell in cells if not not_applicable(cell)} == set(CASES)
