"""Tensors that a trainer holds on a GPU, as a source: mapped by agents and copied device to device, not over the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckpt_core.cuda import driver
from ckpt_core.dtypes import DType
from ckpt_core.errors import ManifestError, TransportError
from ckpt_core.source import DeviceRegion, Extent, SourceIndex

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTensors:
    """An index over device memory of this process. `held` keeps the memory alive: drop it when the update is over."""

    index: SourceIndex
    held: tuple[torch.Tensor, ...]


def export_tensors(tensors: Mapping[str, torch.Tensor]) -> ExportedTensors | None:
    """Index CUDA tensors by the allocations they lie in; None where the driver cannot export one of these.

    Torch's native allocator gives exportable memory; its expandable segments and cudaMallocAsync do not.

    Args:
        tensors: on any GPUs of this process; a tensor that is not contiguous is copied on its device.

    Raises:
        ManifestError: a dtype that no checkpoint can hold.
    """
    import torch

    regions: dict[int, tuple[int, DeviceRegion]] = {}
    extents, held = [], []
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        held.append(tensor)
        with torch.cuda.device(tensor.device):
            torch.cuda.synchronize()
            try:
                number, offset = _locate(tensor, regions)
            except TransportError:
                return None
        extents.append(_extent(name, tensor, number, offset))
    index = SourceIndex(files=(), extents=tuple(extents), regions=tuple(region for _, region in regions.values()))
    return ExportedTensors(index=index, held=tuple(held))


def _locate(tensor: torch.Tensor, regions: dict[int, tuple[int, DeviceRegion]]) -> tuple[int, int]:
    """Number of the tensor's region, and its offset there."""
    if not tensor.numel():
        return 0, 0
    base, size = driver.address_range(tensor.data_ptr())
    if base not in regions:
        uuid = driver.device_uuid(tensor.device.index)
        regions[base] = (len(regions), DeviceRegion(uuid=uuid, handle=driver.export(base), size_bytes=size))
    return regions[base][0], tensor.data_ptr() - base


def _extent(name: str, tensor: torch.Tensor, number: int, offset: int) -> Extent:
    try:
        dtype = DType.from_torch_name(str(tensor.dtype))
    except KeyError:
        raise ManifestError(f"tensor {name!r}: no checkpoint can hold {tensor.dtype}; convert it first") from None
    return Extent(
        name=name,
        dtype=dtype,
        shape=tuple(tensor.shape),
        file=number,
        offset_bytes=offset,
        size_bytes=tensor.numel() * tensor.element_size(),
    )
