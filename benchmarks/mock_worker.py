"""A rank of the stand-in for an inference engine: parameters of a tensor-parallel rank, and no forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from ckpt_core.contract import LoadTensor
from ckpt_core.layout import Box, LayoutEntry
from ckpt_core.strided import row_major

if TYPE_CHECKING:
    import torch
    from shapes import Shape

_SIGNAL_BYTES = 2 << 20
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MockOptions:
    """What the ranks are made of.

    `one_visible` hides the other GPUs from each rank; `cut` takes tensors in parts; `record` has its loader recorded;
    `apart` gives each rank an IPC namespace of its own, so that it counts as one on another host (Linux, root); `everywhere`
    has each rank copy every byte of what arrives into memory of its own GPU, before it takes its slices.
    """

    model: str
    layers: int
    world: int
    device: str
    one_visible: bool = True
    cut: bool = True
    record: bool = False
    instance: str = "mock"
    apart: bool = False
    everywhere: bool = False


class MockWorker:
    """One rank."""

    def __init__(self, options: MockOptions, rank: int) -> None:
        import torch
        from shapes import MODELS

        self.options, self.rank, self._torch = options, rank, torch
        index = 0 if options.one_visible else rank
        self.device = torch.device(options.device, index if options.device == "cuda" else None)
        self.shapes: dict[str, Shape] = {shape.name: shape for shape in MODELS[options.model](options.layers)}
        self.boxes = {name: shape.box(rank, options.world) for name, shape in self.shapes.items()}
        self.entries = tuple(
            LayoutEntry(tensor=name, box=box, group=_group(name), cut=options.cut) for name, box in self.boxes.items()
        )
        self.parameters = {
            name: torch.zeros(box.shape, dtype=getattr(torch, self.shapes[name].dtype.torch_name), device=self.device)
            for name, box in self.boxes.items()
        }
        self._landing = torch.empty(0, dtype=torch.uint8, device=self.device)
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

    def load(self, tensors: Sequence[LoadTensor]) -> None:
        """Copy what this rank needs of each part, in one batch for each type."""
        dense: list[tuple[torch.Tensor, torch.Tensor]] = []
        for item in self._landed(tensors) if self.options.everywhere else tensors:
            place = self._place(item.name, item.box)
            if place is None:
                continue
            target, inside, whole_rows = place
            strides = row_major(item.box.shape if item.box is not None else self.shapes[item.name].shape)
            source = self._copyable(item.strided(inside.shape, strides, sum(map(int.__mul__, inside.start, strides))))
            if whole_rows:
                dense.append((target, source))
            else:  # one strided tensor in a batch would send the whole batch down the slow road
                target.copy_(source, non_blocking=True)
        self._copy_all(dense)

    def _copy_all(self, copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Targets and sources of whole rows; types apart, since a mixed batch goes the slow road too."""
        batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in copies:
            targets, sources = batches.setdefault(target.dtype, ([], []))
            targets.append(target)
            sources.append(source)
        for batch in batches.values():
            self._torch._foreach_copy_(*batch, non_blocking=True)

    def _landed(self, tensors: Sequence[LoadTensor]) -> list[LoadTensor]:
        """The same in memory of this rank's own GPU."""
        views = [item.tensor for item in tensors]
        needed = sum(view.nbytes + -view.nbytes % _ALIGNMENT for view in views)
        if self._landing.nbytes < needed:
            del self._landing  # before there is a new one
            self._landing = self._torch.empty(needed, dtype=self._torch.uint8, device=self.device)
        copies, offset = [], 0
        for view in views:
            copies.append(self._landing[offset : offset + view.nbytes].view(view.dtype).view(view.shape))
            offset += view.nbytes + -view.nbytes % _ALIGNMENT
        self._copy_all(zip(map(self._copyable, copies), map(self._copyable, views), strict=True))
        return [
            LoadTensor(name=item.name, box=item.box, tensor=copy) for item, copy in zip(tensors, copies, strict=True)
        ]

    def _copyable(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same bytes in a type that all of torch's kernels take: FP8 as integers."""
        return tensor.view(self._torch.int8) if tensor.itemsize == 1 else tensor

    def poison(self) -> None:
        """Spoil all weights, with values that no generated checkpoint has."""
        for parameter in self.parameters.values():
            self._copyable(parameter).fill_(-1)

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
                self._places[key] = (self._copyable(self.parameters[name])[region.slices], inside, whole_rows)
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
            shape = self.shapes[name]
            expected = self._copyable(expected_values(name, shape.shape, seed, self.device, shape.dtype))
            wrong += int((self._copyable(parameter) != expected[self.boxes[name].slices]).sum())
        return wrong


@cache  # layers repeat the same few
def _geometry(part: Box | None, shape: tuple[int, ...], needed: Box) -> tuple[Box, Box, bool] | None:
    """Region of the parameter, region of the part, and whether that is whole rows."""
    whole = part or Box.whole(shape)
    mine = whole.intersect(needed)
    if mine is None:
        return None
    return mine.relative_to(needed), mine.relative_to(whole), mine.shape[1:] == whole.shape[1:]


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name
