"""GPU tests run the benchmark's stand-in engine: real agents, rings, ranks and signals, and no forward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_core.cuda import driver

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2] / "benchmarks")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    count = driver.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("gpu2") else 1 if item.get_closest_marker("gpu") else 0
        if count < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, this machine has {count}"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Checkpoints of 2.5 GB by seed: two versions of the same shapes."""
    from generated import write_checkpoint
    from shapes import MODELS

    directory = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for seed in (1, 2):
        made[seed] = directory / f"version-{seed}.safetensors"
        write_checkpoint(made[seed], MODELS["qwen3-30b-a3b"](1), seed)
    yield made
    for path in made.values():
        path.unlink()
