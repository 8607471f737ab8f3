"""`ckpt new-engine`: the skeleton of a plugin as a distribution of its own, from the templates in new_engine/."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from ckpt_core import plugins
from ckpt_core.cli_options import OUT
from ckpt_core.errors import ConfigError

app = typer.Typer()

_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "{package}/__init__.py": "package.py",
    "{package}/plugin.py": "plugin.py",
    "{package}/harness.py": "harness.py",
    "tests/test_conformance.py": "suite.py",
    ".github/workflows/conformance.yml": "conformance.yml",
}


@app.command()
def new_engine(
    name: Annotated[str, typer.Argument(help="The engine, as in --engine NAME.")],
    directory: Annotated[Path | None, typer.Option(help="Where it is written; by default ckpt-NAME.")] = None,
) -> None:
    """Write the skeleton of a plugin for an engine: package, entry points, conformance harness, CI."""
    _check_name(name)
    place = directory or Path(f"ckpt-{name}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} is there already; name another --directory, or move it away")
    _write(place, name)
    OUT.print(
        f"{place} is written; its README.md says what to do, beginning with\n"
        f"  python -m pip install -e '{place}[test]' && ckpt-conformance --engine {name}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is no name for an engine; expected small letters and digits, like my-engine2")
    if name in plugins.names():
        raise ConfigError(f"a plugin for {name!r} is installed already; see `ckpt engines`, and choose another name")


def _write(place: Path, name: str) -> None:
    module = name.replace("-", "_")
    words = {
        "engine": name,
        "module": module,
        "package": f"ckpt_{module}",
        "class_name": "".join(word.capitalize() for word in module.split("_")),
    }
    for path, template in _FILES.items():
        text = files("ckpt_core").joinpath("new_engine", f"{template}.template").read_text(encoding="utf-8")
        target = place / path.format(**words)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(words), encoding="utf-8")
