"""Ranks on GPUs join: agents read out of owners' host memory into pinned slots, and from there into their rings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mock_ranks import engine, updater
from pool_owners import Owners

from ckpt_core import Peers
from ckpt_core.config import UpdateConfig
from ckpt_core.metrics import Stage
from ckpt_core.transport.p2p.choice import installed

pytestmark = [pytest.mark.gpu2, pytest.mark.timeout(240)]
LIBRARIES = pytest.mark.parametrize("library", installed(), ids=lambda library: library.value)


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    with ExitStack() as stack:
        yield Owners(stack, tmp_path)


@LIBRARIES
def test_what_is_joined_is_what_owners_have(owners: Owners, checkpoints: dict[int, Path], library) -> None:
    files = {seed: owners.start(checkpoints[seed], library, count=2) for seed in (1, 2)}
    with engine() as ranks, updater(ranks) as moving:
        for seed in (1, 2, 1):
            ranks.call("poison")
            report = moving.update(Peers(offers=files[seed]))
            assert ranks.call("wrong", seed) == [0, 0]
            print(f"{library.value}: {report.size_bytes / report.stages[Stage.TRANSFER.value] / 1e9:.2f} GB/s")  # noqa: T201


@LIBRARIES
def test_an_owner_dies_in_the_middle(owners: Owners, checkpoints: dict[int, Path], library) -> None:
    files = owners.start(checkpoints[2], library, count=2)
    killed: list[Path] = []

    def kill(stage: Stage, done: int, _total: int) -> None:
        if stage is Stage.TRANSFER and done and not killed:
            killed.append(files[0])
            owners.processes[files[0]].kill()

    with engine() as ranks, updater(ranks, UpdateConfig(fingerprint=False), kill) as moving:
        moving.update(Peers(offers=files, max_bytes_per_s=1e9))
        assert killed
        assert ranks.call("wrong", 2) == [0, 0]
