"""The checks under somebody else's pytest: a strict configuration of his own, and nothing of ours in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STRICT = """[pytest]
addopts = --strict-markers --strict-config --import-mode=importlib -p no:cacheprovider -rA
filterwarnings = error
xfail_strict = true
python_functions = check_*
"""
MODULE = """
from ckpt_conformance.levels import Tier
from ckpt_conformance.mutants.workers import LyingAbort
from ckpt_conformance.pytest_suite import conformance_test
from ckpt_conformance.reference.harness import ReferenceHarness


class Known(ReferenceHarness):
    known_failures = {"transactional.abort_honest": "it lies", "core.plugin_loads": "was mended long ago"}


check_static = conformance_test(Known(LyingAbort), tiers=[Tier.STATIC])
check_known = conformance_test(Known(LyingAbort), tiers=[Tier.WORKER])
check_engine = conformance_test(ReferenceHarness(LyingAbort), tiers=[Tier.WORKER])
"""
TIMEOUT_S = 100


def test_passes_failures_and_known_failures_are_pytests_own(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(STRICT)
    (tmp_path / "test_engine.py").write_text(MODULE)
    chosen = "plugin_loads or capabilities_explained or abort_honest or identify_stable"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", chosen],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    verdicts = {line.split()[1]: line.split()[0] for line in lines if "::check_" in line and " " in line}
    assert verdicts == {
        "test_engine.py::check_static[core.plugin_loads]": "FAILED",  # stale
        "test_engine.py::check_static[core.capabilities_explained]": "PASSED",
        "test_engine.py::check_known[core.identify_stable]": "PASSED",
        "test_engine.py::check_known[transactional.abort_honest]": "XFAIL",
        "test_engine.py::check_engine[core.identify_stable]": "PASSED",
        "test_engine.py::check_engine[transactional.abort_honest]": "FAILED",
    }
    for said in ("passes, but is a known failure: was mended long ago", "usual cause:", "got:         UNTOUCHED"):
        assert said in done.stdout
