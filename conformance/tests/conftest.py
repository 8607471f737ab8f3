"""What holds for every test of the suite and the reference engine."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's controllers remember, the next one's do not know."""
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
