"""`ckpt new-engine`: the skeleton is clean, loads, and its suite says what is to be written."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ckpt_conformance.harness import Harness
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.reference.harness import ReferenceHarness
from ckpt_conformance.report import Status, closing_lines
from ckpt_conformance.runner import Runner, select
from ckpt_core import hookspecs
from ckpt_core.cli_new_engine import app
from ckpt_core.errors import ConfigError
from ckpt_core.plugins import EnginePlugin

NAME = "skeletal-engine"
FILES = {
    ".github/workflows/conformance.yml",
    "README.md",
    "ckpt_skeletal_engine/__init__.py",
    "ckpt_skeletal_engine/harness.py",
    "ckpt_skeletal_engine/plugin.py",
    "pyproject.toml",
    "tests/test_conformance.py",
}
TIMEOUT_S = 60


def new(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def skeleton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written, and importable for this test and its child processes."""
    place = tmp_path / "skeleton"
    assert new(NAME, "--directory", place).exit_code == 0
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
    for module in [name for name in sys.modules if name.startswith("ckpt_skeletal_engine")]:
        monkeypatch.delitem(sys.modules, module)
    return place


def test_it_has_package_entry_points_harness_and_ci(skeleton: Path) -> None:
    assert {path.relative_to(skeleton).as_posix() for path in skeleton.rglob("*") if path.is_file()} == FILES
    project = (skeleton / "pyproject.toml").read_text()
    assert 'skeletal-engine = "ckpt_skeletal_engine.plugin"' in project
    assert 'skeletal-engine = "ckpt_skeletal_engine.harness:harness"' in project
    workflow = (skeleton / ".github/workflows/conformance.yml").read_text()
    assert "ckpt-conformance --engine skeletal-engine" in workflow
    assert "<!-- ckpt-conformance: table of skeletal-engine -->" in (skeleton / "README.md").read_text()


@pytest.mark.parametrize("name", ["a", "my-very-long-engine-name2"])
def test_it_is_clean_under_its_own_rules(tmp_path: Path, name: str) -> None:
    new(name, "--directory", tmp_path / name)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=tmp_path / name,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_its_plugin_loads_and_has_every_required_hook(skeleton: Path) -> None:
    plugin = EnginePlugin(import_module("ckpt_skeletal_engine.plugin"), name=NAME)
    assert all(plugin.has(hook) for hook in hookspecs.REQUIRED)
    assert not any(plugin.info.support(capability).usable for capability in plugin.info.capabilities)


def test_its_suite_names_the_method_of_the_harness_to_be_written_first(skeleton: Path) -> None:
    harness: Harness = import_module("ckpt_skeletal_engine.harness").harness
    report = Runner(harness).run(select(Level.SHARDED, (Tier.STATIC, Tier.WORKER)))
    assert {result.status for result in report.results if result.check.tier is Tier.STATIC} == {Status.PASSED}
    assert not [r for r in report.results if r.check.tier is Tier.WORKER and r.status is Status.PASSED]
    text = "\n".join(closing_lines(report))
    assert text.count("got:         NotImplementedError: harness.checkpoint: write a tiny safetensors checkpoint") == 1
    assert "the same error in core.identify_by_itself" in text


def test_with_a_harness_its_suite_names_the_hook(skeleton: Path) -> None:
    half = ReferenceHarness(implementation=import_module("ckpt_skeletal_engine.plugin"))
    half.engine = NAME
    (result,) = Runner(half).run(select(Level.SHARDED, (), ("core.identify_stable",))).results
    assert result.failure is not None
    assert "ckpt_identify: say which rank" in result.failure.got


@pytest.mark.parametrize("name", ["", "A", "2fast", "a b", "a/b", "../a", "-a", "a-", "class", "$x"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for an engine"):
        new("--directory", tmp_path / "place", "--", name)
    assert not (tmp_path / "place").exists()


def test_an_engine_that_has_a_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="installed already"):
        new("reference", "--directory", tmp_path / "place")


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="there already"):
        new(NAME, "--directory", tmp_path)
    with pytest.raises(ConfigError, match="there already"):
        new(NAME, "--directory", tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
