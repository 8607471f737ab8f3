"""The project's wheel, installed over an environment that already has the engine: it works, and torch stays."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "docs", "results", "tests")
# what a user's environment of that engine would not have: this project, and two of its dependencies that engines may lack
LEFT_OUT = ("ckpt_", "__editable__", "pluggy", "typer")
TIMEOUT_S = 200


def run(python, *arguments):
    """Output of a command that succeeds, with nothing of this checkout in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=Path(python).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree = tmp_path_factory.mktemp("wheel") / "checkout"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, f"--wheel-dir={tree.parent}", tree)
    (built,) = tree.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """Python of an environment that sees the engine's packages, by links, and installs into itself."""
    base = tmp_path_factory.mktemp("layered")
    run(sys.executable, "-m", "venv", base / "venv")
    links = base / "engine"
    links.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(LEFT_OUT):
            (links / path.name).symlink_to(path)
    (own,) = (base / "venv").glob("lib/python*/site-packages")
    (own / "engine.pth").write_text(f"{links}\n")
    return base / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def installed(layered, wheel):
    """What pip installed beside the wheel, by name."""
    report = wheel.parent / "report.json"
    run(layered, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"--report={report}", wheel)
    return {entry["metadata"]["name"].lower() for entry in json.loads(report.read_text())["install"]}


def test_torch_and_the_engine_stay(layered, installed, engine):
    assert "ckpt-core" in installed
    assert not [name for name in installed if name.startswith(("torch", "nvidia", "triton", engine))], installed
    asked = "import importlib.metadata as m; print(m.version('torch'), m.version('numpy'))"
    assert run(layered, "-c", asked).split() == [version("torch"), version("numpy")]


def test_the_installed_wheel_finds_the_engine(layered, installed, engine):
    assert "ckpt-core" in installed
    asked = f"import ckpt_core; from ckpt_core import plugins; print(ckpt_core.__file__); p = plugins.load({engine!r})"
    where, found = run(layered, "-c", f"{asked}; print(p.info.engine_version)").split()
    assert Path(where).is_relative_to(layered.parents[1])
    assert found == version(engine).split("+")[0] or found == version(engine)
    listed = run(layered.parent / "ckpt", "engines")
    assert engine in listed
    assert found in listed
