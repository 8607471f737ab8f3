"""The checks as tests of plain pytest, under whatever configuration its user has: no plugin, no marker, no fixture of ours.

In a test module::

    from ckpt_conformance.pytest_suite import conformance_test
    from my_package.harness import harness

    test_conformance = conformance_test(harness)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter

import pytest
import torch

from ckpt_conformance.checks.registry import Check
from ckpt_conformance.harness import Harness
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.report import Result, Status, failure_lines
from ckpt_conformance.runner import RunCheck, Runner, select


def conformance_test(
    harness: Harness, *, level: Level = Level.SHARDED, tiers: Sequence[Tier] = (), try_all: bool = False
) -> Callable[[Check], None]:
    """A test function with one case a check, to be assigned to a name that pytest collects.

    A check that is skipped is a skip with its reason, a known failure an xfail, a stale one a failure.

    Args:
        harness: of the engine.
        level: checks up to this level.
        tiers: only these; empty for all.
        try_all: run checks of capabilities that are not claimed, too.
    """
    run = _LateRun(Runner(harness, try_all=try_all))

    @pytest.mark.parametrize("check", select(level, tiers), ids=attrgetter("check_id"))
    def test_conformance(check: Check) -> None:
        with _one_thread():
            _tell(run(check))

    return test_conformance


class _LateRun:
    """Begins with the first check: a module that is only collected loads no plugin. Ends with the process."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._run_check: RunCheck | None = None

    def __call__(self, check: Check) -> Result:
        if self._run_check is None:
            resources = ExitStack()
            self._run_check = resources.enter_context(self._runner.opened())
            weakref.finalize(self, resources.close)
        return self._run_check(check)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tell(result: Result) -> None:
    if result.status is Status.SKIPPED:
        pytest.skip(result.reason)
    text = "\n".join(failure_lines(result))
    if result.status is Status.KNOWN:
        pytest.xfail(f"{result.reason}\n{text}")
    if result.status in (Status.FAILED, Status.STALE):
        pytest.fail(text, pytrace=False)
