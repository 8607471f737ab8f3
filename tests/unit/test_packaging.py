"""What an installation gets: five import packages, two commands, one engine, and no say over torch."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = {
    "ckpt_core": "",
    "ckpt_vllm": "plugins/vllm",
    "ckpt_sglang": "plugins/sglang",
    "ckpt_trtllm": "plugins/trtllm",
    "ckpt_conformance": "conformance",
}
BUILD_TIMEOUT_S = 100
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "docs", "results")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(arguments: Sequence[str | Path], *, cwd: Path) -> None:
    # a path from outside would let a build see this checkout
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path, out: Path) -> Path:
    """The wheel of a source tree or sdist, built with what is installed here: no network."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(["-m", "pip", "wheel", "--quiet", *options, f"--wheel-dir={out}", source], cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: builds leave things behind."""
    tree = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return tree


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    out = tree.parent / "sdist"
    out.mkdir()
    run(["-c", BUILD_SDIST, out], cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build_wheel(tree, tree.parent / "wheel")


def names_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def text_of(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return Parser().parsestr(text_of(wheel, "METADATA"))


def test_the_wheel_has_exactly_the_five_packages(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names_of(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGE_ROOTS)


def test_the_wheel_has_every_module_and_template_and_no_test(wheel: Path, tree: Path) -> None:
    expected = {
        path.relative_to(tree / root).as_posix()
        for package, root in PACKAGE_ROOTS.items()
        for pattern in ("*.py", "py.typed", "*.template")
        for path in (tree / root / package).rglob(pattern)
    }
    assert {name for name in names_of(wheel) if ".dist-info/" not in name} == expected
    assert {f"{package}/py.typed" for package in PACKAGE_ROOTS} <= expected
    assert not [name for name in expected if "/tests/" in name or name.split("/")[-1].startswith("test_")]


def test_every_folder_with_modules_is_a_package(tree: Path) -> None:
    roots = [tree / root / package for package, root in PACKAGE_ROOTS.items()]
    folders = {*roots, *(path.parent for root in roots for path in root.rglob("*.py"))}
    bare = [folder.relative_to(tree).as_posix() for folder in folders if not (folder / "__init__.py").is_file()]
    assert not bare, f"these need an __init__.py: {sorted(bare)}"


def test_no_package_where_one_would_shadow_an_engine() -> None:
    folders = [ROOT / "plugins", *(ROOT / "plugins").iterdir(), ROOT / "conformance", ROOT / "tests"]
    folders += [path for path in (ROOT / "tests").rglob("*") if path.is_dir()]
    assert not [folder for folder in folders if (folder / "__init__.py").exists()]


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    rebuilt = build_wheel(sdist, tmp_path / "rebuilt")
    assert rebuilt.name == wheel.name
    assert sorted(names_of(rebuilt)) == sorted(names_of(wheel))


def test_commands_and_engines(wheel: Path) -> None:
    entry_points = configparser.ConfigParser(delimiters="=")
    entry_points.read_string(text_of(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {
        "ckpt": "ckpt_core.cli:main",
        "ckpt-conformance": "ckpt_conformance.cli:main",
    }
    assert entry_points["ckpt_core.engines"]["reference"] == "ckpt_conformance.reference.plugin"
    assert "pytest11" not in entry_points, "the suite must not load itself into other people's pytest"


def test_every_entry_point_leads_to_a_module(wheel: Path) -> None:
    entry_points = configparser.ConfigParser(delimiters="=")
    entry_points.read_string(text_of(wheel, "entry_points.txt"))
    targets = {value.split(":")[0] for section in entry_points.values() for value in section.values()}
    names = set(names_of(wheel))
    paths = {target: target.replace(".", "/") for target in targets}
    assert not [t for t, path in paths.items() if not {f"{path}.py", f"{path}/__init__.py"} & names]


def test_no_extra_takes_all_or_moves_torch(metadata: Message) -> None:
    assert "all" not in metadata.get_all("Provides-Extra", [])
    requirements = metadata.get_all("Requires-Dist", [])
    torch = [r for r in requirements if re.match(r"torch(vision|audio)?\b", r)]
    # the lowest version the code works with; an engine's own torch stays where it is
    assert torch == ["torch>=2.4"]
    assert not [r for r in requirements if re.search(r"==|~=|<", r.split(";")[0])], "bounds are loose"


def test_licence_is_named_and_shipped(metadata: Message, wheel: Path) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in text_of(wheel, "licenses/LICENSE")
