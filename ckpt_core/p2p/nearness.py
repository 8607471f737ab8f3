"""How near a NIC is to a GPU or to a memory node: by their places in the PCI tree, and by memory nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol, TypeVar

from ckpt_core import numa

SYSFS = Path("/sys")
_ROOT = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


class Nearness(IntEnum):
    """What lies between two devices, or a device and memory; the nearer, the greater."""

    OTHER_NODE = 0
    UNKNOWN = 1  # may be near: better than what is known to be far
    SAME_NODE = 2
    SAME_ROOT = 3  # one root complex: through the CPU's host bridge, not between sockets
    SAME_SWITCH = 4  # below one bridge


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Distance:
    """Compares by nearness, then by how much of their way two devices share.

    Attributes:
        shared: PCI devices from the root complex down that both are below.
    """

    nearness: Nearness
    shared: int = 0


class Placed(Protocol):
    """What has a place in the machine: a NIC, or a `Place`."""

    @property
    def node(self) -> int | None:
        """Memory node; None where it is not known."""

    @property
    def path(self) -> tuple[str, ...]:
        """PCI devices from the root complex down to it, itself included; () where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a GPU is, or memory: that has a node only."""

    node: int | None = None
    path: tuple[str, ...] = ()


_Somewhere = TypeVar("_Somewhere", bound=Placed)


def pci_path(device: Path) -> tuple[str, ...]:
    """Root complex, bridges and device, out of where a sysfs link to a device leads; () where that is on no PCI bus.

    .../devices/pci0000:15/0000:15:01.0/0000:17:00.0 gives the last three.
    """
    parts = device.resolve().parts if device.exists() else ()
    return tuple(part for part in parts if _ROOT.fullmatch(part) or _ADDRESS.fullmatch(part))


def place_of(pci_bus_id: str, sysfs: Path = SYSFS) -> Place:
    """Place of a GPU, by an id as the driver or nvidia-smi writes it; an empty one where the system does not tell."""
    match = _ADDRESS.fullmatch(pci_bus_id.strip().lower())
    if match is None:
        return Place()
    address = f"{int(match[1], 16):04x}:{match[2]}"  # nvidia-smi writes domains with eight digits
    return Place(node=numa.node_of(address, sysfs), path=pci_path(sysfs / "bus/pci/devices" / address))


def distance(one: Placed, other: Placed) -> Distance:
    """How near two are."""
    shared = _common(one.path, other.path)
    if shared:
        return Distance(nearness=Nearness.SAME_SWITCH if shared > 1 else Nearness.SAME_ROOT, shared=shared)
    if one.node is None or other.node is None:
        return Distance(nearness=Nearness.UNKNOWN)
    return Distance(nearness=Nearness.SAME_NODE if one.node == other.node else Nearness.OTHER_NODE)


def nearest(candidates: Sequence[_Somewhere], place: Placed) -> tuple[_Somewhere, ...]:
    """All that are as near as any, in order: the NICs to use for a GPU or a memory node."""
    distances = [distance(candidate, place) for candidate in candidates]
    best = max(distances, default=None)
    return tuple(candidate for candidate, found in zip(candidates, distances, strict=True) if found == best)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
