"""The NICs of this host: RDMA devices and, where there are none, network interfaces. sysfs is read under a root that tests replace.

What the kernel says of them is described in its Documentation/ABI/stable/sysfs-class-infiniband and testing/sysfs-class-net.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ckpt_core.config import Environment
from ckpt_core.errors import ConfigError
from ckpt_core.p2p.nearness import SYSFS, pci_path
from ckpt_core.p2p.nic_filter import NicFilter, parse_nic_filter

OWN_OPTION = "CKPT_NICS"
NCCL_OPTION = "NCCL_IB_HCA"
_ACTIVE = "4"  # IB_PORT_ACTIVE
_LOOPBACK = "772"  # ARPHRD_LOOPBACK
_NUMBER = re.compile(r"\d+(\.\d+)?")


class NicKind(Enum):
    """What drives it."""

    RDMA = "RDMA device"
    NETWORK = "network interface"


class LinkLayer(Enum):
    """What is on the wire."""

    INFINIBAND = "InfiniBand"
    ETHERNET = "Ethernet"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One port of a NIC.

    Attributes:
        number: from 1.
        gbit_s: 1e9 bits a second; None where the system does not tell (most virtual interfaces).
        up: whether it carries traffic now.
    """

    number: int
    layer: LinkLayer
    gbit_s: float | None
    up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """One device.

    Attributes:
        node: memory node it is at; None where the system does not tell.
        path: PCI devices from the root complex down to it; () for one that is not on a PCI bus.
    """

    name: str
    kind: NicKind
    ports: tuple[Port, ...]
    node: int | None
    path: tuple[str, ...]

    @property
    def pci_bus_id(self) -> str:
        """As the driver writes it ("0000:17:00.0"); "" where there is none."""
        return self.path[-1] if self.path else ""

    @property
    def bytes_per_s(self) -> float | None:
        """Nominal rate of the ports that are up, together; None where one of them does not tell."""
        rates = [port.gbit_s for port in self.ports if port.up]
        return sum(rate * 1e9 / 8 for rate in rates if rate) if rates and all(rates) else None


def rdma_nics(sysfs: Path = SYSFS) -> tuple[Nic, ...]:
    """All RDMA devices, with all their ports, by name."""
    return tuple(_rdma_nic(device) for device in _entries(sysfs / "class/infiniband"))


def network_nics(sysfs: Path = SYSFS) -> tuple[Nic, ...]:
    """Network interfaces that lead out of this host, by name.

    Left out: the loopback, bridges, and parts of a bridge or bond. Where some are hardware or bonds of it, only those; else,
    as in most containers, the virtual ones.
    """
    folders = [folder for folder in _entries(sysfs / "class/net") if _leads_out(folder)]
    real = [folder for folder in folders if (folder / "device").exists() or (folder / "bonding").is_dir()]
    return tuple(_network_nic(folder) for folder in real or folders)


def selected(nics: Sequence[Nic], wanted: NicFilter) -> tuple[Nic, ...]:
    """Those with ports that are up and that the filter takes, with these ports only."""
    found = []
    for nic in nics:
        ports = tuple(port for port in nic.ports if port.up and wanted.takes(nic.name, port.number))
        if ports:
            found.append(replace(nic, ports=ports))
    return tuple(found)


def discover(*, own: str = "", nccl: str = "", sysfs: Path = SYSFS) -> tuple[Nic, ...]:
    """NICs to read through: RDMA devices, and where none is left, network interfaces.

    Args:
        own: CKPT_NICS, for both kinds; comes before the other.
        nccl: NCCL_IB_HCA, for RDMA devices: the names that it lists are theirs.

    Raises:
        ConfigError: an option that cannot be read, or that leaves nothing although there are NICs.
    """
    wanted = parse_nic_filter(own or nccl, source=OWN_OPTION if own else NCCL_OPTION)
    all_rdma = rdma_nics(sysfs)
    if rdma := selected(all_rdma, wanted):
        return rdma
    interfaces = network_nics(sysfs)
    if not own and wanted.names and selected(all_rdma, NicFilter()):
        raise _nothing_left(wanted, own or nccl, all_rdma)
    found = selected(interfaces, wanted if own else NicFilter())
    if not found and wanted.names and (all_rdma or interfaces):
        raise _nothing_left(wanted, own or nccl, (*all_rdma, *interfaces))
    return found


def nics_here(own: str = "") -> tuple[Nic, ...]:
    """Those of this host that the environment leaves; `own` comes before CKPT_NICS. See `discover`."""
    environment = Environment.read()
    return discover(own=own or environment.nics, nccl=environment.nccl_ib_hca)


def _nothing_left(wanted: NicFilter, text: str, nics: Sequence[Nic]) -> ConfigError:
    ports = [f"{nic.name}:{port.number}{'' if port.up else ' (down)'}" for nic in nics for port in nic.ports]
    return ConfigError(
        f"{wanted.source}={text!r}: expected it to leave a NIC that is up, got none of {', '.join(ports)}; mend or unset it"
    )


def _rdma_nic(folder: Path) -> Nic:
    numbers = sorted(int(port.name) for port in _entries(folder / "ports") if port.name.isdecimal())
    ports = tuple(_rdma_port(number, folder / f"ports/{number}") for number in numbers)
    return Nic(name=folder.name, kind=NicKind.RDMA, ports=ports, node=_node(folder), path=pci_path(folder / "device"))


def _rdma_port(number: int, folder: Path) -> Port:
    rate = _NUMBER.match(_read(folder / "rate"))  # "400 Gb/sec (4X NDR)"
    layers = {layer.value: layer for layer in LinkLayer}
    return Port(
        number=number,
        layer=layers.get(_read(folder / "link_layer"), LinkLayer.UNKNOWN),
        gbit_s=float(rate[0]) or None if rate else None,
        up=_read(folder / "state").partition(":")[0] == _ACTIVE,  # "4: ACTIVE"
    )


def _network_nic(folder: Path) -> Nic:
    mbit_s = _read(folder / "speed")  # -1 or an error where it is not known
    port = Port(
        number=1,
        layer=LinkLayer.ETHERNET,
        gbit_s=int(mbit_s) / 1000 if mbit_s.isdecimal() and int(mbit_s) else None,
        up=_read(folder / "operstate") == "up",
    )
    return Nic(
        name=folder.name, kind=NicKind.NETWORK, ports=(port,), node=_node(folder), path=pci_path(folder / "device")
    )


def _leads_out(folder: Path) -> bool:
    inside = (folder / "bridge").is_dir() or (folder / "master").exists()
    return folder.is_dir() and not inside and _read(folder / "type") != _LOOPBACK


def _node(folder: Path) -> int | None:
    text = _read(folder / "device/numa_node")  # -1 on most virtual machines
    return int(text) if text.isdecimal() else None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # also what reading the speed of an interface that is down gives
        return ""
