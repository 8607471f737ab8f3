"""A stand-in for an inference engine, for benchmarks only: parameters of a tensor-parallel rank, and no forward pass.

It holds one parameter per checkpoint tensor, cut along the dimension that tensor parallelism splits, which is what the
peer's benchmark engine holds too. Each rank is a process; the control side talks to it over a pipe.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mock_worker import MockOptions, MockWorker

from ckpt_core.capability import FULL, Capability
from ckpt_core.contract import (
    AbortOutcome,
    AttachResult,
    DeviceKind,
    EndpointState,
    EndpointStatus,
    EngineInfo,
    LiveState,
    LiveTensor,
    LoadBucket,
    LoadReport,
    PauseMode,
    RankInfo,
    RecordingTarget,
    Rendezvous,
    Update,
)
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError
from ckpt_core.hookspecs import hookimpl
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_core.plugins import EnginePlugin

ENGINE = "mock"
_CLONE_NEWIPC = 0x08000000


# -- hooks -----------------------------------------------------------------------------------------------------------
class MockPlugin:
    """The plugin, as an object: benchmarks do not install it."""

    @hookimpl
    def ckpt_engine_info(self) -> EngineInfo:
        """A stand-in."""
        capabilities = {Capability.PAUSE_WAIT: FULL, Capability.LIVE_READ: FULL, Capability.STABLE_ADDRESSES: FULL}
        return EngineInfo(name=ENGINE, plugin_version="0", engine_version="0", capabilities=capabilities)

    @hookimpl
    def ckpt_identify(self, worker: MockWorker) -> RankInfo:
        """Rank and device."""
        cuda = worker.device.type == "cuda"
        return RankInfo(
            instance_id=worker.options.instance,
            device_kind=DeviceKind.CUDA if cuda else DeviceKind.CPU,
            device_index=worker.device.index or 0,
            device_uuid=gpu_uuid(worker.device.index) if cuda else f"cpu-{worker.rank}",
            rank=worker.rank,
            world_size=worker.options.world,
            tp_rank=worker.rank,
            tp_size=worker.options.world,
        )

    @hookimpl
    def ckpt_layout(self, worker: MockWorker, manifest: Manifest) -> Layout:
        """This rank's slices."""
        return Layout(entries=worker.entries)

    @hookimpl
    def ckpt_recording_target(self, worker: MockWorker) -> RecordingTarget | None:
        """The parameters and a loader of whole tensors, where that is asked for."""
        if not worker.options.record:
            return None
        return RecordingTarget(model=worker.module, load=worker.load_whole, live=worker.module)

    @hookimpl
    def ckpt_begin(self, worker: MockWorker, update: Update) -> None:
        """Parameters are always loadable."""

    @hookimpl
    def ckpt_load(self, worker: MockWorker, update: Update, bucket: LoadBucket) -> LoadReport:
        """Copy."""
        worker.load(bucket.tensors)
        return LoadReport(loaded=tuple(item.name for item in bucket.tensors))

    @hookimpl
    def ckpt_finish(self, worker: MockWorker, update: Update) -> None:
        """Wait for the copies."""
        worker.synchronize()

    @hookimpl
    def ckpt_abort(self, worker: MockWorker, update: Update, cause: str) -> AbortOutcome:
        """A new update repairs everything."""
        return AbortOutcome.RELOADABLE

    @hookimpl
    def ckpt_live(self, worker: MockWorker) -> Mapping[str, LiveTensor]:
        """All parameters."""
        return {name: LiveTensor(tensor=t, state=LiveState.PURE) for name, t in worker.parameters.items()}

    @hookimpl
    def ckpt_ready(self, endpoint: Endpoint) -> EndpointStatus:
        """Ask the ranks."""
        return endpoint.handle.status()

    @hookimpl
    def ckpt_attach(self, endpoint: Endpoint, rendezvous: Rendezvous) -> None:
        """All ranks at once."""
        endpoint.handle.attach(rendezvous)

    @hookimpl
    def ckpt_pause(self, endpoint: Endpoint, mode: PauseMode) -> int:
        """Nothing runs."""
        return 0

    @hookimpl
    def ckpt_resume(self, endpoint: Endpoint, version: str | None) -> None:
        """Nothing waits."""


def plugin() -> EnginePlugin:
    """The plugin, checked like any other."""
    return EnginePlugin(MockPlugin(), name=ENGINE)


def gpu_uuid(index: int) -> str:
    """UUID of a GPU of this process, as the driver spells it."""
    from ckpt_core.cuda import driver

    return driver.device_uuid(index)


# -- processes ---------------------------------------------------------------------------------------------------------
class MockEngine:
    """The ranks, from the control side. A context manager."""

    def __init__(self, options: MockOptions, uuids: Sequence[str] = ()) -> None:
        self.options = options
        self.uuids = tuple(uuids)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(options.world):
            ours, theirs = context.Pipe()
            visible = uuids[rank] if uuids and options.one_visible else ""
            process = context.Process(target=_rank_main, args=(options, rank, visible, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._gather()
        if options.device == "cuda" and not options.apart:
            self.call("map_peers", self.call("signal_handle"))

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    def __enter__(self) -> MockEngine:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            process.kill()

    def status(self) -> EndpointStatus:
        """Always serving."""
        kind = DeviceKind(self.options.device)
        return EndpointStatus(
            engine=ENGINE,
            state=EndpointState.SERVING,
            world_size=self.options.world,
            device_kind=kind,
            device_uuids=self.uuids,
            instance_id=self.options.instance,
        )

    def attach(self, rendezvous: Rendezvous) -> list[AttachResult]:
        """Blocks until all ranks are out."""
        return self.call("attach", rendezvous)

    def call(self, name: str, *args: Any) -> list[Any]:
        """Run a function of this module in every rank; results by rank."""
        for pipe in self._pipes:
            pipe.send((name, args))
        return self._gather()

    def call_one(self, rank: int, name: str, *args: Any) -> Any:
        """Run a function in one rank."""
        self._pipes[rank].send((name, args))
        if not self._pipes[rank].poll(60):
            raise EngineError(f"rank {rank} of the mock engine does not answer")
        ok, value = self._pipes[rank].recv()
        if not ok:
            raise EngineError(value)
        return value

    def _gather(self) -> list[Any]:
        results: dict[Connection, Any] = {}
        sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while len(results) < len(self._pipes):
            waiting = [pipe for pipe in self._pipes if pipe not in results]
            for ready in wait([*waiting, *sentinels], timeout=600):
                if ready in sentinels:
                    raise EngineError(f"rank {sentinels[ready]} of the mock engine died")  # type: ignore[index]
                assert isinstance(ready, Connection)
                ok, value = ready.recv()
                if not ok:
                    raise EngineError(value)
                results[ready] = value
        return [results[pipe] for pipe in self._pipes]


def _rank_main(options: MockOptions, rank: int, visible: str, pipe: Connection) -> None:
    if options.apart and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), "an IPC namespace for each rank needs root")
    if visible:
        import os

        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    import torch

    import ckpt_core.worker  # noqa: F401 a real engine imports its plugin when it starts

    torch.set_num_threads(1)
    worker, own = MockWorker(options, rank), plugin()
    pipe.send((True, None))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            sys.exit(0)
        try:
            pipe.send((True, COMMANDS[name](worker, own, *args)))
        except Exception:  # noqa: BLE001 the control side raises it
            pipe.send((False, traceback.format_exc()))


def _attach(worker: MockWorker, own: EnginePlugin, rendezvous: Rendezvous) -> AttachResult:
    from ckpt_core.worker import attach

    return attach(worker, rendezvous, engine=ENGINE, plugin=own)


def _memory(worker: MockWorker, _own: EnginePlugin) -> tuple[int, int]:
    """Free and total bytes of the rank's GPU, by the driver."""
    import torch

    free, total = torch.cuda.mem_get_info(worker.device)
    return int(free), int(total)


COMMANDS = {
    "synchronize": lambda worker, _own: worker.synchronize(),
    "attach": _attach,
    "memory": _memory,
    "signal_handle": lambda worker, _own: worker.signal_handle(),
    "map_peers": lambda worker, _own, handles: worker.map_peers(handles),
    "wrong": lambda worker, _own, seed: worker.wrong_bytes(seed),
    "poison": lambda worker, _own: worker.poison(),
}
