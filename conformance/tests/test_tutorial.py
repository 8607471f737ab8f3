"""The tutorial of conformance/README.md, executed as it stands there: with wheels, in a clean environment, out of this tree.

Its blocks, in order: `# file:` is written, `sh` is run, `text` after it must be in the output, `diff` is applied.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "conformance" / "README.md"
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "docs", "results", "tests")
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of the tutorial. `exit_code` is what its last command must end with."""

    language: str
    exit_code: int
    text: str


def blocks(section: str) -> Iterator[Block]:
    for match in FENCE.finditer(section):
        language, rest, text = match.groups()
        yield Block(language=language, exit_code=int(rest.strip().removeprefix("exit=") or 0), text=text)


def tutorial() -> str:
    _, _, rest = README.read_text(encoding="utf-8").partition("\n## A plugin in twenty minutes\n")
    return rest.partition("\n## ")[0]


class Reader:
    """Does what the tutorial says.

    Args:
        directory: where.
        environment: variables of its commands.
    """

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory, self._environment = directory, environment
        self._output = ""

    def follow(self, block: Block) -> None:
        if block.language == "sh":
            self._output = self.run(["bash", "-euo", "pipefail", "-c", block.text], exit_code=block.exit_code)
        elif block.language == "text":
            assert_shown(block.text, self._output)
        elif block.language == "diff":
            self._apply(block.text)
        else:
            self._write(block.text)

    def run(self, command: list[str], *, exit_code: int = 0) -> str:
        process = subprocess.Popen(
            command,
            cwd=self._directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):  # a server that its shell could not end
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == exit_code, f"{command[-1]}\nended with {process.returncode}:\n{output}"
        return output

    def _write(self, text: str) -> None:
        first, _, rest = text.partition("\n")
        assert first.startswith("# file: "), f"what is this block? {first}"
        path = self._directory / first.removeprefix("# file: ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(rest)

    def _apply(self, text: str) -> None:
        header, *hunks = text.split("\n@@\n")
        path = self._directory / header.removeprefix("--- ")
        changed = path.read_text()
        for hunk in hunks:
            lines = hunk.splitlines()
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            assert changed.count(before) == 1, f"not once in {path.name}:\n{before}"
            changed = changed.replace(before, "".join(f"{line[1:]}\n" for line in lines if line[0] in " +"))
        path.write_text(changed)


def assert_shown(expected: str, output: str) -> None:
    """Each line of the block is in the output, in that order; `...` stands for anything within a line."""
    found = iter([line.strip() for line in output.splitlines()])
    for line in filter(None, (line.strip() for line in expected.splitlines())):
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("...")))
        assert any(pattern.fullmatch(candidate) for candidate in found), f"not shown: {line}\nin:\n{output}"


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, str]:
    """Variables of an environment with the project's wheel, and with the libraries that are installed here, by links."""
    wheel = project_wheel(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=TIMEOUT_S)
    links = tmp_path / "libraries"
    links.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("ckpt_", "__editable__")):
            (links / path.name).symlink_to(path)
    (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text(f"{links}\n")
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTEST_ADDOPTS"}}
    environment |= {
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",  # nothing is fetched: all that is needed is here
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the wrong way round: isolation is off
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    reader = Reader(tmp_path, environment)
    reader.run(["bash", "-c", f"python -m pip install --quiet --no-deps {wheel}"])
    return environment


def project_wheel(directory: Path) -> Path:
    tree = directory / "checkout"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, f"--wheel-dir={directory}", tree]
    subprocess.run(command, cwd=directory, env=environment, check=True, timeout=TIMEOUT_S)
    shutil.rmtree(tree)
    (wheel,) = directory.glob("*.whl")
    return wheel


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_the_tutorial_goes_from_nothing_to_a_green_table(clean: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "author"
    place.mkdir()
    reader = Reader(place, {**clean, "PORT": str(free_port())})
    for block in blocks(tutorial()):
        reader.follow(block)
    for check in (["check"], ["format", "--check"]):
        reader.run([sys.executable, "-m", "ruff", *check, "--no-cache", "ckpt-toy"])
    where = "import ckpt_core, ckpt_conformance, ckpt_toy; print(*(m.__path__[0] for m in (ckpt_core, ckpt_conformance, ckpt_toy)))"
    installed = (tmp_path / "venv").resolve()
    assert all(Path(path).resolve().is_relative_to(installed) for path in reader.run(["python", "-c", where]).split())
    assert "| STABLE_ADDRESSES | full | yes |" in (place / "ckpt-toy" / "README.md").read_text()
    assert 'failures="0"' in (place / "report.xml").read_text()


def test_every_block_of_the_tutorial_is_understood() -> None:
    found = list(blocks(tutorial()))
    assert {block.language for block in found} == {"python", "toml", "sh", "text", "diff"}
    assert tutorial().count("\n```") == 2 * len(found)


def test_what_is_not_shown_is_missed() -> None:
    assert_shown("a\nc ... e", "a\nb\nc d e\n")
    for expected in ("b\na", "c e", "c ... f", "a\na"):
        with pytest.raises(AssertionError, match="not shown"):
            assert_shown(expected, "a\nb\nc d e\n")
