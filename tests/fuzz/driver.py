"""Runs one target under atheris; see docs/guides/fuzzing.md."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckpt_core", "json"]):
    from mutator import mutator
    from targets import TARGETS, bound_memory, seeds


def main(target: str) -> None:
    """Fuzz until told to stop; the first folder that is named gets the seeds and keeps what is new."""
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        folders[0].mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(target)):
            (folders[0] / f"seed-{number}").write_bytes(seed)
    bound_memory()
    atheris.Setup(sys.argv, TARGETS[target], custom_mutator=mutator(target))
    atheris.Fuzz()
