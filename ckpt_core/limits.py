"""What this machine can do at most: copies by its CPUs, from the host to its GPUs, on them and between them.

The planner and the reports compare themselves with these. All rates are 1e9 bytes copied a second, best of repeated rounds
(a ceiling is what was reached once, not on average). Measured with the driver, without torch, in a few seconds; kept in a
file for the machine they were measured on. `python -m ckpt_core.limits` prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from ckpt_core.cuda import probe
from ckpt_core.errors import CkptError, ConfigError
from ckpt_core.trace import SpanStage

_log = logging.getLogger(__name__)
_THREAD_BYTES = 16 << 20
_MOST_THREADS = 64
_MOST_REPEATS = 4096
_ROUND_S = 10e-3  # long against starting and awaiting copies
_MOST_PAIRS_SHOWN = 12

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What limits hold for: they are measured again where any of this differs. GPUs are the visible ones, in order."""

    machine_id: str
    cpu_model: str
    cpus: int
    driver_version: str
    gpus: tuple[probe.GpuIdentity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimit:
    """One GPU reads another's memory; indexes into the machine's GPUs."""

    reader: int
    owner: int
    gb_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Ceilings of one machine, GB/s.

    Attributes:
        measured_unix_s: when.
        memcpy_one_gb_s, memcpy_all_gb_s: copies in host memory, by one thread and by `memcpy_threads`.
        h2d_gb_s: from page-locked memory to each GPU alone.
        h2d_together_gb_s: to all at once, their sum; None without a GPU.
        d2d_gb_s: within each GPU.
        peers: pairs that can read each other; pairs that cannot are left out.
    """

    machine: Machine
    measured_unix_s: float
    memcpy_one_gb_s: float
    memcpy_all_gb_s: float
    memcpy_threads: int
    h2d_gb_s: tuple[float, ...]
    h2d_together_gb_s: float | None
    d2d_gb_s: tuple[float, ...]
    peers: tuple[PeerLimit, ...]

    def h2d_to(self, uuids: Iterable[str]) -> float | None:
        """Limit from the host to these GPUs together (with or without the GPU- prefix); None where one was not measured.

        For some of the GPUs it is an upper bound: what each can alone, and no more than all together.
        """
        wanted = {uuid.removeprefix("GPU-") for uuid in uuids}
        known = {
            gpu.uuid.removeprefix("GPU-"): rate for gpu, rate in zip(self.machine.gpus, self.h2d_gb_s, strict=True)
        }
        if not wanted or not wanted <= known.keys() or self.h2d_together_gb_s is None:
            return None
        if len(wanted) == 1:
            return known[wanted.pop()]
        return min(self.h2d_together_gb_s, sum(known[uuid] for uuid in wanted))

    def by_stage(self, devices: Iterable[str]) -> dict[SpanStage, float]:
        """Limits of a pipeline's stages, for agents with rings on these devices (UUIDs, or "cpu")."""
        devices = list(devices)
        if all(device == "cpu" for device in devices):
            return {SpanStage.FILL: self.memcpy_all_gb_s}
        limit = self.h2d_to(devices)
        return {} if limit is None else {SpanStage.COPY: limit}


class Devices(Protocol):
    """GPUs to measure, by index. Each copy is of `size_bytes`, started and not waited for."""

    size_bytes: int
    count: int

    def copy_in(self, gpu: int) -> None:
        """From page-locked host memory."""

    def copy_within(self, gpu: int) -> None:
        """On the device."""

    def can_read(self, reader: int, owner: int) -> bool:
        """Whether one can map the other's memory."""

    def copy_from(self, reader: int, owner: int) -> None:
        """From the other device."""

    def synchronize(self, gpu: int) -> None:
        """Wait for the copies of one."""


def measure(machine: Machine, devices: Devices, seconds: float, *, clock: Clock = time.perf_counter) -> Limits:
    """Measure everything in about that many seconds, on a machine that is otherwise idle.

    Args:
        devices: the machine's GPUs; see `cuda.probe.open_gpus`.

    Raises:
        ConfigError: no time to measure in.
        TransportError: a copy failed.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"limits take a positive number of seconds to measure in, got {seconds}")
    gpus = range(devices.count)
    pairs = [pair for pair in itertools.permutations(gpus, 2) if devices.can_read(*pair)]
    rate = _Rate(budget_s=seconds / (2 + 2 * len(gpus) + bool(gpus) + len(pairs)), clock=clock)
    threads = min(machine.cpus, _MOST_THREADS)
    one, several = (_memcpy_gb_s(count, rate) for count in (1, threads))

    def of(start: Callable[[int], None], which: Sequence[int]) -> float:
        return rate.best_gb_s(
            lambda: _for_each(start, which),
            lambda: _for_each(devices.synchronize, which),
            len(which) * devices.size_bytes,
        )

    return Limits(
        machine=machine,
        measured_unix_s=time.time(),
        memcpy_one_gb_s=one,
        memcpy_all_gb_s=max(one, several),
        memcpy_threads=threads,
        h2d_gb_s=tuple(of(devices.copy_in, [gpu]) for gpu in gpus),
        h2d_together_gb_s=of(devices.copy_in, gpus) if gpus else None,
        d2d_gb_s=tuple(of(devices.copy_within, [gpu]) for gpu in gpus),
        peers=tuple(
            PeerLimit(reader=a, owner=b, gb_s=of(functools.partial(devices.copy_from, owner=b), [a])) for a, b in pairs
        ),
    )


def _for_each(act: Callable[[int], None], which: Sequence[int]) -> None:
    for index in which:
        act(index)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    """Repeats a copy for a while, in rounds that grow until one is long enough to be timed well."""

    budget_s: float
    clock: Clock

    def best_gb_s(self, start: Callable[[], None], finish: Callable[[], None], size_bytes: int) -> float:
        """Rate of the best round, after one to warm up."""
        deadline_s = self.clock() + self.budget_s
        start()
        finish()
        best, repeats, timed = 0.0, 1, False
        while not timed or self.clock() < deadline_s:
            began_s = self.clock()
            for _ in range(repeats):
                start()
            finish()
            took_s = max(self.clock() - began_s, 1e-9)
            best = max(best, repeats * size_bytes / 1e9 / took_s)
            timed = took_s >= _ROUND_S or repeats >= _MOST_REPEATS
            repeats *= 1 if timed else 2
        return best


def _memcpy_gb_s(threads: int, rate: _Rate) -> float:
    """Copies in host memory; each thread copies a part of its own, which it also touched first."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    running: list[Future[None]] = []
    with ThreadPoolExecutor(threads) as pool:
        makers = [pool.submit(lambda: (_touched(_THREAD_BYTES), _touched(_THREAD_BYTES))) for _ in range(threads)]
        parts += [maker.result() for maker in makers]

        def start() -> None:
            running.extend(pool.submit(np.copyto, *part) for part in parts)

        def finish() -> None:
            for future in running:
                future.result()
            running.clear()

        return rate.best_gb_s(start, finish, threads * _THREAD_BYTES)


def _touched(size_bytes: int) -> np.ndarray:
    return np.ones(size_bytes, dtype=np.uint8)


# -- which machine -----------------------------------------------------------------------------------------------------
def identify() -> Machine:
    """This machine and its visible GPUs, without touching their memory."""
    gpus = probe.visible_gpus()
    return Machine(
        machine_id=_machine_id(),
        cpu_model=_cpu_model(Path("/proc/cpuinfo")),
        cpus=len(os.sched_getaffinity(0)),
        driver_version=probe.driver_version() if gpus else "",
        gpus=gpus,
    )


def _machine_id() -> str:
    """A digest: the id itself is meant to stay on the machine. Containers may lack it, or share their image's."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/etc/machine-id").read_text().strip()
    return xxhash.xxh3_64_hexdigest((text or socket.gethostname()).encode())


def _cpu_model(cpuinfo: Path) -> str:
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()  # the kernel names no models of some architectures


# -- the file they are kept in, and the table ------------------------------------------------------------------------------
def cache_file(directory: Path, machine: Machine) -> Path:
    """Where the limits of a machine are kept; one file for each choice of visible GPUs."""
    gpus = xxhash.xxh3_64_hexdigest(" ".join(gpu.uuid for gpu in machine.gpus).encode())
    return directory / f"limits-{machine.machine_id}-{gpus[:8]}.json"


def load(directory: Path | None, machine: Machine) -> Limits | None:
    """What was measured before on exactly this machine; None where nothing was, or the file is of another."""
    if directory is None:
        return None
    path = cache_file(directory, machine)
    try:
        limits = msgspec.json.decode(path.read_bytes(), type=Limits)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("the limits in %s are not used: %s", path, error)
        return None
    if limits.machine != machine or not len(limits.h2d_gb_s) == len(limits.d2d_gb_s) == len(machine.gpus):
        _log.info("the limits in %s are of another machine or driver; measure again", path)
        return None
    return limits


def save(directory: Path | None, limits: Limits) -> None:
    """Keep them, where there is a directory to keep them in; one that cannot be written costs only the next measurement."""
    if directory is None:
        return
    path = cache_file(directory, limits.machine)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        part.write_bytes(to_json(limits))
        part.replace(path)
    except OSError as error:
        _log.warning("the limits could not be kept in %s: %s", path, error)


def to_json(limits: Limits) -> bytes:
    """Stable, indented JSON."""
    return msgspec.json.format(msgspec.json.encode(limits), indent=2) + b"\n"


def limits_table(limits: Limits) -> Table:
    """For people."""
    machine = limits.machine
    table = Table(title=f"limits of this machine: {machine.cpu_model}, {machine.cpus} CPUs", title_justify="left")
    table.add_column("copy")
    table.add_column("GB/s", justify="right")
    for what, rate in _rows(limits):
        table.add_row(what, f"{rate:.1f}")
    if machine.gpus:
        table.caption = f"driver {machine.driver_version}"
    return table


def _rows(limits: Limits) -> Iterator[tuple[str, float]]:
    gpus = limits.machine.gpus
    yield "host memory, one thread", limits.memcpy_one_gb_s
    yield f"host memory, {limits.memcpy_threads} threads", limits.memcpy_all_gb_s
    for index, rate in enumerate(limits.h2d_gb_s):
        yield f"host to GPU {index} ({gpus[index].name}) alone", rate
    if limits.h2d_together_gb_s is not None:
        yield f"host to all {len(gpus)} GPUs at once", limits.h2d_together_gb_s
    for index, rate in enumerate(limits.d2d_gb_s):
        yield f"within GPU {index}", rate
    if len(limits.peers) <= _MOST_PAIRS_SHOWN:
        for peer in limits.peers:
            yield f"GPU {peer.reader} from GPU {peer.owner}", peer.gb_s
    else:
        slowest = min(limits.peers, key=lambda peer: peer.gb_s)
        yield f"slowest of {len(limits.peers)} pairs: GPU {slowest.reader} from GPU {slowest.owner}", slowest.gb_s


def main() -> None:
    """Measure and print; for machines where the command line's other needs are not installed."""
    parser = argparse.ArgumentParser(description="Measure the ceilings of this machine.")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to measure in")
    parser.add_argument("--cache-dir", type=Path, help="directory to keep the result in")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    try:
        with probe.open_gpus() as devices:
            limits = measure(identify(), devices, options.seconds)
    except CkptError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    save(options.cache_dir, limits)
    if options.json:
        sys.stdout.buffer.write(to_json(limits))
    else:
        Console().print(limits_table(limits))


if __name__ == "__main__":
    main()
