"""The command: selection, exit codes, known and stale failures, forms of the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree as ET

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ckpt_conformance import runner as running
from ckpt_conformance.checks.registry import load_all
from ckpt_conformance.cli import app, main
from ckpt_conformance.harness import Harness
from ckpt_conformance.levels import Level, ModelKind
from ckpt_conformance.mutants.workers import LyingAbort
from ckpt_conformance.reference.harness import ReferenceHarness
from ckpt_core.errors import ConfigError, PluginNotFound

Use: TypeAlias = Callable[[Harness], None]
QUICK = "core.identify_stable"
TIMEOUT_S = 60
LYING = ReferenceHarness(LyingAbort)


class _Known(ReferenceHarness):
    known_failures: Mapping[str, str] = {"transactional.abort_honest": "it lies", QUICK: "was mended long ago"}


class _Bare(ReferenceHarness):
    kinds = frozenset({ModelKind.PLAIN})
    streams = False
    sleep = Harness.sleep


known_and_lying = _Known(LyingAbort)
bare = _Bare()
no_harness = object()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def choose(harness: Harness) -> None:
        monkeypatch.setattr("ckpt_conformance.cli.find_harness", lambda *_: harness)

    return choose


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_passing_run_ends_with_the_plain_summary() -> None:
    result = run("--check", QUICK)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["pass", QUICK]
    assert lines[-1] == "1 passed, 0 failed, 0 skipped"


def test_failure_explains_itself_and_fails_the_run(use: Use, tmp_path: Path) -> None:
    use(LYING)
    files = {name: tmp_path / name for name in ("json", "markdown", "junit")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    result = run("--check", "transactional.abort_honest", *options)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"
    for label in ("rule:", "rank:", "expected:", "got:", "usual cause:"):
        assert label in result.output
    report = json.loads(files["json"].read_text())
    assert report["ok"] is False
    assert report["results"][0]["failure"]["got"] == "UNTOUCHED"
    assert "| `transactional.abort_honest` | FAIL |" in files["markdown"].read_text()
    suite = ET.fromstring(files["junit"].read_text())  # noqa: S314 our own file
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("1", "1", "0")
    assert suite.find("testcase/failure") is not None


def test_known_failure_passes_and_a_stale_one_fails_the_run(use: Use) -> None:
    use(known_and_lying)
    known = run("--check", "transactional.abort_honest")
    assert known.exit_code == 0
    assert known.output.splitlines()[-1] == "0 passed, 0 failed, 0 skipped, 1 known"
    stale = run("--check", QUICK)
    assert stale.exit_code == 1
    assert "STALE" in stale.output
    assert stale.output.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_what_a_harness_does_not_offer_is_skipped_with_the_reason(use: Use) -> None:
    use(bare)
    wanted = ("core.begin_refused_while_asleep", "core.tied_weights", "core.in_flight_keep")
    result = run(*(part for check in wanted for part in ("--check", check)))
    assert result.exit_code == 0
    assert "the harness does not offer servers that tell tokens as they come" in result.output
    assert "the harness does not offer sleep()" in result.output
    assert "no model of kind tied" in result.output
    assert result.output.splitlines()[-1] == "0 passed, 0 failed, 3 skipped"


def test_capability_table_shows_declared_and_proven() -> None:
    result = run("--check", "transactional.snapshot_exact")
    row = next(line for line in result.output.splitlines() if line.startswith("SNAPSHOT"))
    assert row.split() == ["SNAPSHOT", "full", "yes"]
    lora = next(line for line in result.output.splitlines() if line.startswith("LORA"))
    assert lora.split()[1:3] == ["not_implemented", "-"]


def test_list_names_every_check_and_its_rule() -> None:
    result = run("--list", "--level", "SHARDED", "--tier", "server")
    assert result.exit_code == 0
    assert "core.server_update" in result.output
    assert "transactional.resume_while_poisoned" in result.output
    assert result.output.splitlines()[-1] == "7 checks"


def test_a_level_includes_those_below_it_and_a_named_check_needs_none() -> None:
    counts = [len(running.select(level)) for level in Level]
    assert counts == sorted(set(counts)), counts
    assert {check.level for check in running.select(Level.VERIFIED)} == {Level.CORE, Level.VERIFIED}
    assert running.select(Level.SHARDED) == list(load_all())
    (named,) = running.select(Level.CORE, (), ("sharded.sharded_slices",))
    assert named.level is Level.SHARDED


def test_the_order_of_checks_is_that_of_their_topics_whatever_was_imported_first() -> None:
    program = (
        "import ckpt_conformance.checks.server, ckpt_conformance.checks.abort\n"
        "from ckpt_conformance.checks.registry import load_all\n"
        "print(*(check.check_id for check in load_all()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    listed = [line.split()[0] for line in run("--list").output.splitlines() if line.startswith("core.")]
    assert [name for name in done.stdout.split() if name.startswith("core.")] == listed
    assert listed[0] == "core.plugin_loads"


def test_unknown_check_and_engine_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"core\.nonsense"):
        run("--check", "core.nonsense")
    with pytest.raises(PluginNotFound, match=r"nonsense.*installed: reference"):
        run("--engine", "nonsense", "--check", QUICK)
    with pytest.raises(ConfigError, match="expected an instance of Harness"):
        running.find_harness("reference", "ckpt_conformance.levels:Level")


def test_script_ends_with_a_code_of_its_own_where_nothing_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ckpt-conformance", "--engine", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code >= 2
    assert "no conformance harness" in capsys.readouterr().err
