"""The table in a README: written between its markers, compared there, and honest about what was not shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ckpt_conformance import runner as running
from ckpt_conformance.cli import app
from ckpt_conformance.harness import Harness
from ckpt_conformance.levels import Level, ModelKind
from ckpt_conformance.reference.harness import ReferenceHarness
from ckpt_core.errors import ConfigError

MARKERS = "<!-- ckpt-conformance: table of reference -->\n<!-- ckpt-conformance: end of the table -->\n"
QUICK = ("core.identify_stable", "core.begin_refused_while_asleep", "core.tied_weights", "sharded.sharded_slices")


class _Bare(ReferenceHarness):
    kinds = frozenset({ModelKind.PLAIN})
    sleep = Harness.sleep


class _Unknown(ReferenceHarness):
    known_failures: Mapping[str, str] = {"core.nonsense": "there was such a check once"}


@pytest.fixture(autouse=True)
def _few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    few = running.select(Level.SHARDED, (), QUICK)
    monkeypatch.setattr("ckpt_conformance.cli.select", lambda *_: few)


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# An engine\n\n{MARKERS}\n## More\n")
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def use(monkeypatch: pytest.MonkeyPatch, harness: Harness) -> None:
    monkeypatch.setattr("ckpt_conformance.cli.find_harness", lambda *_: harness)


def test_what_was_written_is_found_equal_and_the_rest_stays(readme: Path) -> None:
    assert run("--check-table", readme).exit_code == 1
    assert run("--write-table", readme).exit_code == 0
    text = readme.read_text()
    assert text.startswith("# An engine\n\n<!-- ckpt-conformance: table of reference -->\n`ckpt-conformance --engine")
    assert text.endswith("<!-- ckpt-conformance: end of the table -->\n\n## More\n")
    assert "| TIED_WEIGHTS | full | yes |  |" in text
    assert run("--check-table", readme).exit_code == 0
    assert run("--write-table", readme).exit_code == 0
    assert readme.read_text() == text


def test_a_table_that_differs_fails_the_run_and_shows_where(readme: Path) -> None:
    run("--write-table", readme)
    readme.write_text(readme.read_text().replace("| SLEEP | full | yes |", "| SLEEP | full | no |"))
    result = run("--check-table", readme)
    assert result.exit_code == 1
    assert "-| SLEEP | full | no |" in result.output
    assert "+| SLEEP | full | yes |" in result.output
    assert "--write-table" in result.output


def test_the_table_says_what_was_skipped_and_why(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, _Bare())
    assert run("--write-table", readme).exit_code == 0
    text = readme.read_text()
    reason = "core.begin_refused_while_asleep: the harness does not offer sleep()"
    assert f"| SLEEP | full | - | {reason} |" in text
    assert "| TIED_WEIGHTS | full | - | core.tied_weights: the harness has no model of kind tied |" in text
    assert [line for line in text.splitlines() if line.startswith("*")] == [
        "* sharded.sharded_slices: the harness has no model of kind sharded"
    ]
    assert "| LORA | not_implemented | - | the engine has no adapters |" in text


def test_a_file_without_its_place_is_told_before_anything_runs(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_conformance.cli.Runner", lambda *_, **__: pytest.fail("it ran"))
    readme.write_text("nothing")
    with pytest.raises(ConfigError, match="put these two lines there"):
        run("--write-table", readme)
    with pytest.raises(ConfigError, match="cannot be read"):
        run("--check-table", tmp_path / "none")


def test_a_part_of_the_suite_makes_no_table(readme: Path) -> None:
    for part in (("--check", QUICK[0]), ("--tier", "worker"), ("--try",)):
        with pytest.raises(ConfigError, match="whole suite"):
            run("--write-table", readme, *part)


def test_a_known_failure_of_no_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, _Unknown())
    with pytest.raises(ConfigError, match=r"core\.nonsense: no such check"):
        run()
