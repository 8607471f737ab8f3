"""Updates of ranks on two GPUs: bits, faults with copies in flight, memory, and sources on a GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mock_ranks import LAYERS, MODEL, engine, updater

from ckpt_core.config import MIB, UpdateConfig
from ckpt_core.errors import Outcome, UpdateAborted
from ckpt_core.metrics import Stage

pytestmark = [pytest.mark.gpu2, pytest.mark.timeout(240)]

# with so small a ring a transfer takes long enough to be hit in its middle
SLOW = UpdateConfig(ring_bytes=8 * MIB, bucket_bytes=1 * MIB, fingerprint=False, silence_timeout_s=5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[object]:
    with engine() as running:
        yield running


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("one_visible", [True, False])
def test_bits_are_those_of_the_checkpoint(checkpoints: dict[int, Path], *, cut: bool, one_visible: bool) -> None:
    with engine(cut=cut, one_visible=one_visible) as ranks, updater(ranks) as moving:
        for seed in (1, 2, 1):
            ranks.call("poison")
            report = moving.update(checkpoints[seed])
            assert report.outcome is Outcome.COMMITTED
            assert ranks.call("wrong", seed) == [0, 0]


def test_what_arrives_is_compared_on_gpus(ranks, checkpoints: dict[int, Path]) -> None:
    with updater(ranks) as moving:
        for _ in range(2):
            report = moving.update(checkpoints[1])
            assert report.verified == "arrival"  # this engine is not recorded
            assert all(0 < rank.stats.digested_bytes <= rank.stats.received_bytes for rank in report.ranks)


def test_what_lives_is_compared_where_it_was_replayed(checkpoints: dict[int, Path]) -> None:
    with engine(record=True) as ranks, updater(ranks, UpdateConfig()) as moving:
        levels, prints = [], []
        for seed in (1, 2, 1):
            report = moving.update(checkpoints[seed])
            levels.append(report.verified)
            prints.append([rank.fingerprint for rank in report.ranks])
            assert ranks.call("wrong", seed) == [0, 0]
        assert levels == ["arrival", "live", "live"]
        assert prints[0] == prints[2] != prints[1]


def test_killed_agent_leaves_ranks_alive_and_the_next_update_works(ranks, checkpoints: dict[int, Path]) -> None:
    killed: list[int] = []

    def kill(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.TRANSFER and done and not killed:
            assert done < total
            killed.append(moving.agent_pids[0])
            os.kill(killed[0], signal.SIGKILL)

    with updater(ranks, SLOW, kill) as moving:
        with pytest.raises(UpdateAborted) as caught:
            moving.update(checkpoints[2])
        assert killed
        assert caught.value.outcome is Outcome.POISONED
        assert "agent 0" in str(caught.value)
        ranks.call("synchronize")  # the survivors' streams drain
        moving.update(checkpoints[2])
        assert ranks.call("wrong", 2) == [0, 0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_update_that_loses_an_agent_is_undone(ranks, checkpoints: dict[int, Path], how: signal.Signals) -> None:
    struck: list[int] = []

    def strike(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.TRANSFER and done and armed and not struck:
            struck.append(moving.agent_pids[1])
            os.kill(struck[0], how)

    armed = False
    with updater(ranks, replace(SLOW, transfer_timeout_s=4, commit_timeout_s=5, fingerprint=True), strike) as moving:
        moving.update(checkpoints[1])
        armed = True
        with pytest.raises(UpdateAborted) as caught:
            moving.update(checkpoints[2])
        assert struck
        assert caught.value.outcome is Outcome.RESTORED
        assert ranks.call("wrong", 1) == [0, 0]
        moving.update(checkpoints[2])
        assert ranks.call("wrong", 2) == [0, 0]


def test_a_rank_stopped_past_the_deadline_gives_up_and_is_mended(checkpoints: dict[int, Path]) -> None:
    config = replace(SLOW, transfer_timeout_s=4, commit_timeout_s=5, attach_timeout_s=5)
    with engine() as ranks:
        struck: list[int] = []

        def strike(stage: Stage, done: int, total: int) -> None:
            if stage is Stage.TRANSFER and done and not struck:
                struck.append(ranks.pids[1])
                os.kill(struck[0], signal.SIGSTOP)

        with updater(ranks, config, strike) as moving:
            with pytest.raises(UpdateAborted) as caught:
                moving.update(checkpoints[1])
            assert caught.value.outcome is Outcome.POISONED
            os.kill(struck[0], signal.SIGCONT)
        ranks.call("synchronize")
        with updater(ranks) as moving:
            moving.update(checkpoints[2])
            assert ranks.call("wrong", 2) == [0, 0]


def test_killed_rank_leaves_the_other_alive(checkpoints: dict[int, Path]) -> None:
    with engine() as ranks:
        killed: list[int] = []

        def kill(stage: Stage, done: int, total: int) -> None:
            if stage is Stage.TRANSFER and done and not killed:
                killed.append(ranks.pids[0])
                os.kill(killed[0], signal.SIGKILL)

        with updater(ranks, SLOW, kill) as moving, pytest.raises(UpdateAborted) as caught:
            moving.update(checkpoints[1])
        assert killed
        assert caught.value.outcome is Outcome.POISONED
        ranks.call_one(1, "synchronize")
    with engine() as fresh, updater(fresh) as moving:
        moving.update(checkpoints[1])
        assert fresh.call("wrong", 1) == [0, 0]


def test_nothing_grows_over_twenty_updates_and_all_is_given_back(ranks, checkpoints: dict[int, Path]) -> None:
    def free() -> list[int]:
        return [free for free, _ in ranks.call("memory")]

    def resident(pids: tuple[int, ...]) -> int:
        return sum(psutil.Process(pid).memory_info().rss for pid in pids)

    before_all, shm_before = free(), psutil.disk_usage("/dev/shm").used
    with updater(ranks) as moving:
        for _ in range(3):
            moving.update(checkpoints[1])
        settled, host = free(), resident((*moving.agent_pids, *ranks.pids, os.getpid()))
        for number in range(20):
            moving.update(checkpoints[1 + number % 2])
        assert free() == settled
        assert resident((*moving.agent_pids, *ranks.pids, os.getpid())) - host < 32 * MIB
    assert psutil.disk_usage("/dev/shm").used == shm_before
    lost = [before - after for before, after in zip(before_all, free(), strict=True)]
    assert max(lost) <= 2 * MIB, lost


def test_tensors_of_a_trainer_go_from_gpu_to_gpu(ranks) -> None:
    import torch
    from generated import expected_values
    from shapes import MODELS

    shapes = MODELS[MODEL](LAYERS)
    device = torch.device("cuda", 0)
    policy = {shape.name: expected_values(shape.name, shape.shape, 3, device).clone() for shape in shapes}
    shm_before = psutil.disk_usage("/dev/shm").used
    with updater(ranks) as moving:
        moving.update(policy)
        assert psutil.disk_usage("/dev/shm").used - shm_before < 16 * MIB  # not over the host
        assert ranks.call("wrong", 3) == [0, 0]
        for shape in shapes:
            policy[shape.name].copy_(expected_values(shape.name, shape.shape, 4, device))
        moving.update(policy)
        assert ranks.call("wrong", 4) == [0, 0]


def test_where_there_is_no_room_the_ring_is_smaller(ranks, checkpoints: dict[int, Path]) -> None:
    (_, total), _ = ranks.call("memory")
    asked = 2 * total  # no GPU has room for that ring: it is halved until it fits
    with updater(ranks, UpdateConfig(ring_bytes=asked, bucket_bytes=32 * MIB, fingerprint=False)) as moving:
        report = moving.update(checkpoints[2])
    assert report.ring_bytes < total
    assert ranks.call("wrong", 2) == [0, 0]


def test_pages_are_locked_once_and_can_be_locked_again(ranks, checkpoints: dict[int, Path]) -> None:
    for _ in range(2):
        with updater(ranks) as moving:
            first, second = moving.update(checkpoints[1]), moving.update(checkpoints[1])
            assert first.locked_bytes == 2 * checkpoints[1].stat().st_size
            assert second.locked_bytes == 0
