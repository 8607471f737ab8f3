"""A stand-in for an inference engine, for benchmarks only: parameters of a tensor-parallel rank, and no forward pass.

It holds one parameter per checkpoint tensor, cut along the dimension that tensor parallelism splits, which is what the
peer's benchmark engine holds too. Each rank is a process; the control side talks to it over a pipe.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

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
    LoadTensor,
    PauseMode,
    RankInfo,
    RecordingTarget,
    Rendezvous,
    Update,
)
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import EngineError
from ckpt_core.hookspecs import hookimpl
from ckpt_core.layout import Box, Layout, LayoutEntry
from ckpt_core.manifest import Manifest
from ckpt_core.plugins import EnginePlugin
from ckpt_core.strided import row_major

if TYPE_CHECKING:
    import torch
    from shapes import Shape

ENGINE = "mock"
_SIGNAL_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MockOptions:
    """What the ranks are made of.

    `one_visible` hides the other GPUs from each rank; `cut` takes tensors in parts; `record` has its loader recorded.
    """

    model: str
    layers: int
    world: int
    device: str
    one_visible: bool = True
    cut: bool = True
    record: bool = False


class MockWorker:
    """One rank."""

    def __init__(self, options: MockOptions, rank: int) -> None:
        import torch
        from shapes import MODELS

        self.options, self.rank, self._torch = options, rank, torch
        index = 0 if options.one_visible else rank
        self.device = torch.device(options.device, index if options.device == "cuda" else None)
        self.shapes: dict[str, Shape] = {shape.name: shape for shape in MODELS[options.model](options.layers)}
        self.boxes = {name: self._box(shape) for name, shape in self.shapes.items()}
        self.parameters = {
            name: torch.zeros(box.shape, dtype=torch.bfloat16, device=self.device) for name, box in self.boxes.items()
        }
        self._warm_up()
        self._places: dict[tuple[str, Box | None], tuple[torch.Tensor, Box, bool] | None] = {}
        for name in self.shapes:
            self._place(name, None)

    def _warm_up(self) -> None:
        """Load the copy kernel, as an engine that has served has done long ago."""
        source = self._torch.zeros((64, 64), dtype=self._torch.bfloat16, device=self.device)
        self._torch._foreach_copy_([source[:16], source[16:32]], [source[32:48], source[48:]])
        source[:32, 1:].copy_(source[32:, :-1])
        self.synchronize()

    def signal_handle(self) -> str:
        """A small buffer that the other ranks map, as all-reduce kernels and communicators of TP engines do.

        It counts: to open a ring on another GPU takes 6 to 12 ms in a process that has nothing of that GPU mapped, and
        0.1 ms in one that has.
        """
        from ckpt_core.cuda import driver

        self._signal = driver.allocate(_SIGNAL_BYTES)
        return driver.export(self._signal)

    def map_peers(self, handles: Sequence[str]) -> None:
        """Map the buffers of the other ranks; they stay mapped."""
        from ckpt_core.cuda import driver

        self._peers = [driver.open_exported(handle) for rank, handle in enumerate(handles) if rank != self.rank]

    def _box(self, shape: Shape) -> Box:
        start, size = [0] * len(shape.shape), list(shape.shape)
        if shape.dim is not None:
            size[shape.dim] //= self.options.world
            start[shape.dim] = self.rank * size[shape.dim]
        return Box(start=tuple(start), shape=tuple(size))

    def load(self, tensors: Sequence[LoadTensor]) -> None:
        """Copy what this rank needs of each part, in one batch."""
        dense: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for item in tensors:
            place = self._place(item.name, item.box)
            if place is None:
                continue
            target, inside, whole_rows = place
            strides = row_major(item.box.shape if item.box is not None else self.shapes[item.name].shape)
            source = item.strided(inside.shape, strides, sum(map(int.__mul__, inside.start, strides)))
            if whole_rows:
                dense[0].append(target)
                dense[1].append(source)
            else:  # one strided tensor in a batch would send the whole batch down the slow road
                target.copy_(source, non_blocking=True)
        if dense[0]:
            self._torch._foreach_copy_(*dense, non_blocking=True)

    def load_whole(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A loader as engines have them: whole tensors, narrowed to what this rank needs."""
        for name, values in tensors:
            box = self.boxes[name]
            mine = values
            for d, (first, count) in enumerate(zip(box.start, box.shape, strict=True)):
                mine = mine.narrow(d, first, count)
            self.parameters[name].copy_(mine)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The parameters by their path, as engines hold them."""
        root = self._torch.nn.Module()
        for name, values in self.parameters.items():
            *path, last = name.split(".")
            holder = root
            for part in path:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, self._torch.nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(last, self._torch.nn.Parameter(values, requires_grad=False))
        return root

    def _place(self, name: str, part: Box | None) -> tuple[torch.Tensor, Box, bool] | None:
        """Where a part goes, which part of it, and whether that is whole rows: worked out once per part."""
        key = (name, part)
        if key not in self._places:
            found = _geometry(part, tuple(self.shapes[name].shape), self.boxes[name])
            if found is None:
                self._places[key] = None
            else:
                region, inside, whole_rows = found
                self._places[key] = (self.parameters[name][region.slices], inside, whole_rows)
        return self._places[key]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            self._torch.cuda.synchronize(self.device)

    def wrong_bytes(self, seed: int) -> int:
        """Elements that differ from the generated checkpoint of that seed."""
        from generated import expected_values

        wrong = 0
        for name, parameter in self.parameters.items():
            expected = expected_values(name, self.shapes[name].shape, seed, self.device)
            wrong += int((parameter != expected[self.boxes[name].slices]).sum())
        return wrong


@cache  # layers repeat the same few
def _geometry(part: Box | None, shape: tuple[int, ...], needed: Box) -> tuple[Box, Box, bool] | None:
    """Region of the parameter, region of the part, and whether that is whole rows."""
    whole = part or Box.whole(shape)
    mine = whole.intersect(needed)
    if mine is None:
        return None
    return mine.relative_to(needed), mine.relative_to(whole), mine.shape[1:] == whole.shape[1:]


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
            instance_id="mock",
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
        return Layout(
            entries=tuple(
                LayoutEntry(tensor=name, box=box, group=_group(name), cut=worker.options.cut)
                for name, box in worker.boxes.items()
            )
        )

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


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name


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
        if options.device == "cuda":
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
    "poison": lambda worker, _own: [parameter.fill_(-1) for parameter in worker.parameters.values()] and None,
}
