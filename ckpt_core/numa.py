"""Memory nodes of the host: which one a GPU is at, and binding this process to it.

An agent that fills page-locked memory on the wrong node sends every byte over the link between the sockets. Binding is for
the calling thread and for threads started later: call it first thing in a process. Where there is one node, or nothing is
known, nothing is done and the reason is told. sysfs is read under a root that tests replace.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_SYSFS = Path("/sys")
_MPOL_DEFAULT = 0
_MPOL_PREFERRED = 1  # others are used when the node is full: BIND would kill the process instead
_MOST_NODES = 1024
_SYSCALL_OF = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "loongarch64": 237, "ppc64le": 261, "s390x": 270}
_PCI = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What a process was bound to.

    Attributes:
        node: None where nothing was bound.
        cpus: the CPUs it may run on now; empty where that was left alone.
        memory: whether new pages come from the node first.
        reason: why not all was done; "" where it was.
    """

    node: int | None = None
    cpus: frozenset[int] = frozenset()
    memory: bool = False
    reason: str = ""


class Kernel(Protocol):
    """The three calls of the kernel that binding takes."""

    def allowed_cpus(self) -> frozenset[int]:
        """CPUs that this thread may run on."""

    def run_on(self, cpus: frozenset[int]) -> None:
        """Run on these CPUs only. Raises OSError."""

    def prefer_memory(self, node: int | None) -> None:
        """Take new pages from this node first, or as the system does by default. Raises OSError."""


class LinuxKernel:
    """This machine's kernel, for the calling thread."""

    def allowed_cpus(self) -> frozenset[int]:
        """See Kernel."""
        return frozenset(os.sched_getaffinity(0))

    def run_on(self, cpus: frozenset[int]) -> None:
        """See Kernel."""
        os.sched_setaffinity(0, cpus)

    def prefer_memory(self, node: int | None) -> None:
        """See Kernel; by the system call, since libnuma is often missing."""
        number = _SYSCALL_OF.get(platform.machine())
        if number is None:
            raise OSError(f"set_mempolicy is not known for {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(ctypes.c_long(number), *_policy(node)) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"set_mempolicy: {os.strerror(error)}")


def _policy(node: int | None) -> tuple[ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong]:
    """Mode, mask of nodes and its length, as set_mempolicy takes them; the default mode insists on no mask."""
    if node is None:
        return ctypes.c_long(_MPOL_DEFAULT), ctypes.c_void_p(), ctypes.c_ulong(0)
    width = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MOST_NODES // width))()
    mask[node // width] = 1 << (node % width)
    return ctypes.c_long(_MPOL_PREFERRED), ctypes.cast(mask, ctypes.c_void_p), ctypes.c_ulong(_MOST_NODES)


def nodes(sysfs: Path = _SYSFS) -> tuple[int, ...]:
    """Nodes that are online; () where the system does not tell."""
    return tuple(sorted(_number_list(_read(sysfs / "devices/system/node/online"))))


def cpus_of(node: int, sysfs: Path = _SYSFS) -> frozenset[int]:
    """CPUs of a node; empty for one of memory alone, or where the system does not tell."""
    return _number_list(_read(sysfs / f"devices/system/node/node{node}/cpulist"))


def node_of(pci_bus_id: str, sysfs: Path = _SYSFS) -> int | None:
    """Node of a device, by an id as the driver ("0000:17:00.0") or nvidia-smi ("00000000:17:00.0") writes it.

    None where the system does not tell, as in most virtual machines (-1).
    """
    match = _PCI.fullmatch(pci_bus_id.strip())
    if match is None:
        return None
    domain, *rest = match.groups()
    address = "{:04x}:{}:{}.{}".format(int(domain, 16), *(part.lower() for part in rest))
    text = _read(sysfs / f"bus/pci/devices/{address}/numa_node")
    return int(text) if text.isdecimal() else None


def bind(pci_bus_id: str, *, sysfs: Path = _SYSFS, kernel: Kernel | None = None) -> Binding:
    """Bind this process to the node of a GPU, CPUs and memory, as far as it is allowed. Never raises."""
    online, node = nodes(sysfs), node_of(pci_bus_id, sysfs)
    if len(online) < 2:
        return Binding(reason="the machine has one memory node")
    if node is None or node not in online:
        return Binding(reason=f"the system does not tell the memory node of {pci_bus_id}")
    return _bind(node, cpus_of(node, sysfs), kernel or LinuxKernel())


def _bind(node: int, wanted: frozenset[int], kernel: Kernel) -> Binding:
    reasons: list[str] = []
    cpus = wanted & kernel.allowed_cpus()
    try:
        if cpus:
            kernel.run_on(cpus)
        else:
            reasons.append(f"none of the CPUs of node {node} is allowed to this process")
    except OSError as error:
        cpus = frozenset()
        reasons.append(f"CPUs: {error}")
    memory = True
    try:
        kernel.prefer_memory(node)
    except OSError as error:  # containers often forbid it; bound threads take their pages from their node anyway
        memory = False
        reasons.append(f"memory: {error}")
    return Binding(node=node if cpus or memory else None, cpus=cpus, memory=memory, reason="; ".join(reasons))


@contextmanager
def at(pci_bus_id: str, *, sysfs: Path = _SYSFS, kernel: Kernel | None = None) -> Iterator[Binding]:
    """Bound to the node of a GPU within the block: to touch memory for it, in a process that serves several."""
    kernel = kernel or LinuxKernel()
    before = kernel.allowed_cpus()
    binding = bind(pci_bus_id, sysfs=sysfs, kernel=kernel)
    try:
        yield binding
    finally:
        if binding.cpus:
            kernel.run_on(before)
        if binding.memory:
            kernel.prefer_memory(None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number_list(text: str) -> frozenset[int]:
    """Of the kernel's form "0-3,8,10-11"."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
