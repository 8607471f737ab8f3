"""The unmodified reference engine passes every check, and skips none but those of capabilities it does not claim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ckpt_conformance.checks.registry import Check
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.reference.harness import harness
from ckpt_conformance.report import Status, failure_lines
from ckpt_conformance.runner import Runner, select

pytestmark = pytest.mark.timeout(300)  # servers of two ranks, on a busy machine


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _expect_pass(check: Check) -> None:
    (result,) = Runner(harness).run([check]).results
    assert result.status is Status.PASSED, "\n".join([result.reason, *failure_lines(result)])


@pytest.mark.parametrize("check", select(Level.SHARDED, (Tier.STATIC, Tier.WORKER)), ids=lambda check: check.check_id)
def test_reference_passes(check: Check) -> None:
    _expect_pass(check)


@pytest.mark.integration
@pytest.mark.parametrize("check", select(Level.SHARDED, (Tier.GROUP, Tier.SERVER)), ids=lambda check: check.check_id)
def test_reference_passes_real_updates(check: Check) -> None:
    _expect_pass(check)
