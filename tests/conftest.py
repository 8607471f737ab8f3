"""What holds for every test below this folder."""

from __future__ import annotations

import pytest
from hypothesis import settings

# the machines that run this are shared: how long an example takes says nothing about the code
settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")


@pytest.fixture(autouse=True)
def state_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's controllers remember, the next one's do not know."""
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
