"""The capability table inside a README: between two markers, written there by the command, and compared by it in CI."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from ckpt_conformance.levels import Level
from ckpt_conformance.report import Report, capability_lines, why_not
from ckpt_core.errors import ConfigError

_END = "<!-- ckpt-conformance: end of the table -->"


class TableFile:
    """A file with a place for an engine's table. Made before the checks run: a wrong file is told at once.

    Raises:
        ConfigError: it cannot be read, or has no such place.
    """

    def __init__(self, path: Path, engine: str, level: Level) -> None:
        self._path, self._engine, self._level = path, engine, level
        self._before, self._table, self._after = self._parts()

    def write(self, report: Report) -> None:
        """Put the table there."""
        self._path.write_text(self._before + self._text(report) + self._after, encoding="utf-8")

    def difference(self, report: Report) -> str:
        """What would change in the file, as a diff; empty where nothing would."""
        lines = (self._table.splitlines(), self._text(report).splitlines())
        return "\n".join(difflib.unified_diff(*lines, str(self._path), "this run", lineterm="", n=0))

    def _parts(self) -> tuple[str, str, str]:
        begin = f"<!-- ckpt-conformance: table of {self._engine} -->"
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read ({error}); name the README that has the table") from error
        before, found, rest = text.partition(begin)
        table, ended, after = rest.partition(_END)
        if not found or not ended:
            raise ConfigError(f"{self._path} has no place for a table; put these two lines there:\n{begin}\n{_END}")
        return before + begin + "\n", table.removeprefix("\n"), _END + after

    def _text(self, report: Report) -> str:
        return "\n".join([*_lines(report, self._level), ""])


def _lines(report: Report, level: Level) -> Iterator[str]:
    up_to = "" if level is max(Level) else f" --level {level.name}"
    yield f"`ckpt-conformance --engine {report.engine}{up_to}`: {report.summary}."
    yield ""
    yield from capability_lines(report)
    yield ""
    # of checks that are about a capability the table says it already
    yield from (f"* {text}" for text in why_not([result for result in report.results if not result.check.needs]))
