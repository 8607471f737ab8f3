"""Limits: measured on made-up GPUs, kept in a file, shown."""

from __future__ import annotations

import io
import itertools
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from ckpt_core import limits as limits_module
from ckpt_core.cuda import probe
from ckpt_core.errors import ConfigError
from ckpt_core.limits import Limits, Machine, PeerLimit, cache_file, identify, limits_table, load, measure, save
from ckpt_core.trace import SpanStage

A, B = (probe.GpuIdentity(uuid=f"GPU-{c}", name="Test 9000", pci_bus_id=f"0000:{c}0:00.0") for c in "ab")
MACHINE = Machine(machine_id="m1", cpu_model="Test CPU", cpus=2, driver_version="1, CUDA 13.0", gpus=(A, B))
LIMITS = Limits(
    machine=MACHINE,
    measured_unix_s=1.0,
    memcpy_one_gb_s=10.0,
    memcpy_all_gb_s=15.0,
    memcpy_threads=2,
    h2d_gb_s=(55.0, 54.0),
    h2d_together_gb_s=100.0,
    d2d_gb_s=(2000.0, 2001.0),
    peers=(PeerLimit(reader=0, owner=1, gb_s=370.0), PeerLimit(reader=1, owner=0, gb_s=371.0)),
)


class FakeDevices:
    """GPUs on a bus: each copies at `h2d` alone, all together at no more than `bus`; GB/s. Time is its own."""

    size_bytes = 10**9

    def __init__(
        self, count: int, *, h2d: float = 50.0, bus: float = 80.0, d2d: float = 2000.0, nvlink: float = 400.0
    ) -> None:
        self.count = count
        self.now_s = 0.0
        self._rate_of = {"in": h2d, "within": d2d, "from": nvlink}
        self._bus = bus
        self._started: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()

    def clock(self) -> float:
        return self.now_s

    def copy_in(self, gpu: int) -> None:
        self._start("in", gpu)

    def copy_within(self, gpu: int) -> None:
        self._start("within", gpu)

    def can_read(self, reader: int, owner: int) -> bool:
        return (reader, owner) != (1, 0)

    def copy_from(self, reader: int, owner: int) -> None:
        assert self.can_read(reader, owner)
        self._start("from", reader)

    def synchronize(self, gpu: int) -> None:
        """All started copies end: those of one GPU one after another, those of several side by side."""
        busy = Counter(started for started in self._started)
        seconds = [count / self._rate_of[kind] for (kind, _), count in busy.items()]
        on_bus = sum(count for (kind, _), count in busy.items() if kind == "in") / self._bus
        self.now_s += max([*seconds, on_bus], default=0.0)
        self._started.clear()

    def _start(self, kind: str, gpu: int) -> None:
        self.calls[kind] += 1
        self._started.append((kind, gpu))


@pytest.fixture(autouse=True)
def small_host_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_THREAD_BYTES", 1 << 16)


@pytest.fixture
def no_host_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host copies take real time, which made-up devices know nothing of."""
    monkeypatch.setattr(limits_module, "_memcpy_gb_s", lambda threads, rate: 10.0 * threads)


@pytest.mark.usefixtures("no_host_copies")
def test_gpus_are_measured_alone_together_within_and_between() -> None:
    devices = FakeDevices(2)
    found = measure(MACHINE, devices, 3.0, clock=devices.clock)
    assert found.h2d_gb_s == pytest.approx((50, 50), rel=0.02)
    assert found.h2d_together_gb_s == pytest.approx(80, rel=0.02)
    assert found.d2d_gb_s == pytest.approx((2000, 2000), rel=0.1)
    assert [(peer.reader, peer.owner) for peer in found.peers] == [(0, 1)]
    assert found.peers[0].gb_s == pytest.approx(400, rel=0.05)
    assert found.machine == MACHINE


@pytest.mark.usefixtures("no_host_copies")
def test_fast_copies_are_repeated_until_a_round_can_be_timed() -> None:
    devices = FakeDevices(1, d2d=10_000.0)
    measure(replace(MACHINE, gpus=(A,)), devices, 0.001, clock=devices.clock)
    assert devices.calls["within"] > 60


@pytest.mark.usefixtures("no_host_copies")
def test_seconds_bound_the_measurement() -> None:
    devices = FakeDevices(2)
    measure(MACHINE, devices, 3.0, clock=devices.clock)
    assert 1.5 < devices.now_s < 3.5


def test_without_gpus_the_host_alone_is_measured() -> None:
    found = measure(replace(MACHINE, gpus=()), FakeDevices(0), 0.1)
    assert (found.h2d_gb_s, found.h2d_together_gb_s, found.d2d_gb_s, found.peers) == ((), None, (), ())
    assert 0 < found.memcpy_one_gb_s <= found.memcpy_all_gb_s
    assert found.memcpy_threads == 2


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_no_time_to_measure_in_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds"):
        measure(MACHINE, FakeDevices(0), seconds)


# -- use -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("uuids", "limit"),
    [(["GPU-a"], 55.0), (["b"], 54.0), (["GPU-a", "GPU-b"], 100.0), (["GPU-a", "GPU-c"], None), ([], None)],
)
def test_the_limit_of_some_gpus(uuids: list[str], limit: float | None) -> None:
    assert LIMITS.h2d_to(uuids) == limit


def test_some_of_the_gpus_are_bound_by_their_sum_and_by_the_bus() -> None:
    third = replace(A, uuid="GPU-c")
    three = replace(
        LIMITS, machine=replace(MACHINE, gpus=(A, B, third)), h2d_gb_s=(55.0, 54.0, 20.0), d2d_gb_s=(1.0, 1.0, 1.0)
    )
    assert three.h2d_to(["a", "c"]) == 75.0
    assert three.h2d_to(["a", "b"]) == 100.0


def test_limits_by_stage_of_a_pipeline() -> None:
    assert LIMITS.by_stage(["cpu", "cpu"]) == {SpanStage.FILL: 15.0}
    assert LIMITS.by_stage(["GPU-a", "GPU-b"]) == {SpanStage.COPY: 100.0}
    assert LIMITS.by_stage(["GPU-x"]) == {}


def shown(limits: Limits) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(limits_table(limits))
    return out.getvalue()


def test_the_table_names_every_limit() -> None:
    text = shown(LIMITS)
    for row in (
        "one thread",
        "2 threads",
        "GPU 1 (Test 9000) alone",
        "all 2 GPUs at once",
        "within GPU 0",
        "GPU 0 from GPU 1",
    ):
        assert row in text
    assert "driver 1, CUDA 13.0" in text
    assert all(f" {rate} " in text for rate in ("10.0", "15.0", "55.0", "54.0", "100.0", "2000.0", "370.0"))


def test_many_pairs_are_one_row() -> None:
    pairs = tuple(PeerLimit(reader=a, owner=b, gb_s=300.0 + a) for a, b in itertools.permutations(range(8), 2))
    assert "slowest of 56 pairs: GPU 0 from GPU 1" in shown(replace(LIMITS, peers=pairs))


# -- the file --------------------------------------------------------------------------------------------------------------
def test_limits_are_kept_for_the_machine_they_hold_for(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert load(folder, MACHINE) is None
    save(folder, LIMITS)
    assert load(folder, MACHINE) == LIMITS
    assert [path.name for path in folder.iterdir()] == [cache_file(folder, MACHINE).name]


@pytest.mark.parametrize(
    "other",
    [
        replace(MACHINE, driver_version="2, CUDA 13.0"),
        replace(MACHINE, cpu_model="Other CPU"),
        replace(MACHINE, gpus=(B, A)),
        replace(MACHINE, gpus=(A,)),
        replace(MACHINE, cpus=1),
    ],
)
def test_limits_of_another_machine_are_refused(tmp_path: Path, other: Machine) -> None:
    save(tmp_path, LIMITS)
    cache_file(tmp_path, MACHINE).rename(cache_file(tmp_path, other))
    assert load(tmp_path, other) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"machine": 3}'])
def test_a_spoilt_file_is_told_and_not_used(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache_file(tmp_path, MACHINE).write_bytes(data)
    assert load(tmp_path, MACHINE) is None
    assert "not used" in caplog.text


def test_a_file_with_too_few_rates_is_not_used(tmp_path: Path) -> None:
    cache_file(tmp_path, MACHINE).write_bytes(msgspec.json.encode(replace(LIMITS, h2d_gb_s=(55.0,))))
    assert load(tmp_path, MACHINE) is None


def test_no_directory_means_no_cache(tmp_path: Path) -> None:
    save(None, LIMITS)
    assert load(None, MACHINE) is None


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        save(blocked / "folder", LIMITS)
    assert "could not be kept" in caplog.text


def test_the_module_measures_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckpt_core.limits", "--seconds", "0.05", "--cache-dir", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    printed = msgspec.json.decode(done.stdout, type=Limits)
    assert printed.machine == identify()
    assert load(tmp_path, identify()) == printed


def test_no_torch_is_needed() -> None:
    program = "import sys, ckpt_core.limits, ckpt_core.timeline, ckpt_core.numa; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
