"""NICs of made-up machines: found, chosen by the syntax of NCCL_IB_HCA, and compared by nearness."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt_core.errors import ConfigError
from ckpt_core.p2p.nearness import Distance, Nearness, Place, distance, nearest, place_of
from ckpt_core.p2p.nic_filter import parse_nic_filter
from ckpt_core.p2p.nics import LinkLayer, NicKind, Port, discover, network_nics, rdma_nics

# two sockets with a switch each: a GPU and a NIC below one bridge, another NIC at the socket's other root port
SWITCH_0 = ("pci0000:15", "0000:15:01.0", "0000:16:00.0")
SWITCH_1 = ("pci0000:97", "0000:97:01.0", "0000:98:00.0")
GPU_0, GPU_1 = "0000:18:00.0", "0000:9a:00.0"
IB, ROCE = "InfiniBand", "Ethernet"


class Tree:
    """A sysfs to write devices into."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("bus/pci/devices", "class/infiniband", "class/net", "devices"):
            (root / folder).mkdir(parents=True)

    def pci(self, *path: str, node: int) -> Path:
        device = self.root.joinpath("devices", *path)
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        link(self.root / "bus/pci/devices" / path[-1], device)
        return device

    def rdma(self, name: str, device: Path | None, *ports: tuple[str, str, str]) -> None:
        folder = self.root / "class/infiniband" / name
        folder.mkdir()
        if device is not None:
            link(folder / "device", device)
        for number, (layer, rate, state) in enumerate(ports, start=1):
            write(folder / f"ports/{number}", link_layer=layer, rate=rate, state=state)

    def net(self, name: str, device: Path | None, *, speed: str = "25000", state: str = "up", kind: str = "1") -> Path:
        folder = self.root / "class/net" / name
        write(folder, speed=speed, operstate=state, type=kind)
        if device is not None:
            link(folder / "device", device)
        return folder


def link(at: Path, to: Path) -> None:
    at.symlink_to(os.path.relpath(to, at.parent), target_is_directory=True)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def two_sockets(tree: Tree) -> Tree:
    """mlx5_0 and mlx5_1 near GPU 0, mlx5_10 near GPU 1, a bond of two ports, and a card that is down."""
    tree.pci(*SWITCH_0, GPU_0, node=0)
    tree.pci(*SWITCH_1, GPU_1, node=1)
    tree.rdma("mlx5_0", tree.pci(*SWITCH_0, "0000:17:00.0", node=0), (IB, "400 Gb/sec (4X NDR)", "4: ACTIVE"))
    tree.rdma(
        "mlx5_1",
        tree.pci("pci0000:15", "0000:15:02.0", "0000:19:00.0", node=0),
        (IB, "200 Gb/sec (4X HDR)", "4: ACTIVE"),
        (ROCE, "100 Gb/sec (4X EDR)", "4: ACTIVE"),
        (IB, "10 Gb/sec (4X SDR)", "1: DOWN"),
    )
    tree.rdma("mlx5_10", tree.pci(*SWITCH_1, "0000:99:00.0", node=1), (IB, "400 Gb/sec (4X NDR)", "4: ACTIVE"))
    tree.rdma("mlx5_bond_0", tree.pci("pci0000:40", "0000:41:00.0", node=0), (ROCE, "50 Gb/sec", "4: ACTIVE"))
    tree.rdma("mlx5_down", tree.pci("pci0000:41", "0000:42:00.0", node=0), (IB, "10 Gb/sec (4X SDR)", "1: DOWN"))
    tree.net("eth0", tree.pci("pci0000:43", "0000:44:00.0", node=0))
    return tree


def chosen(tree: Tree, **options: str) -> list[str]:
    return [f"{nic.name}:{port.number}" for nic in discover(sysfs=tree.root, **options) for port in nic.ports]


# -- RDMA devices ------------------------------------------------------------------------------------------------
def test_rdma_devices_are_found_with_their_ports(two_sockets: Tree) -> None:
    nics = {nic.name: nic for nic in rdma_nics(two_sockets.root)}
    assert list(nics) == ["mlx5_0", "mlx5_1", "mlx5_10", "mlx5_bond_0", "mlx5_down"]
    one = nics["mlx5_1"]
    assert one.kind is NicKind.RDMA
    assert one.ports == (
        Port(number=1, layer=LinkLayer.INFINIBAND, gbit_s=200.0, up=True),
        Port(number=2, layer=LinkLayer.ETHERNET, gbit_s=100.0, up=True),
        Port(number=3, layer=LinkLayer.INFINIBAND, gbit_s=10.0, up=False),
    )
    assert one.bytes_per_s == 300e9 / 8
    assert (one.node, one.pci_bus_id) == (0, "0000:19:00.0")
    assert nics["mlx5_10"].node == 1
    assert nics["mlx5_0"].path == (*SWITCH_0, "0000:17:00.0")
    assert nics["mlx5_down"].bytes_per_s is None


def test_what_the_system_does_not_tell_stays_open(tree: Tree) -> None:
    tree.rdma("rxe0", None, ("", "", "4: ACTIVE"))
    (nic,) = discover(sysfs=tree.root)
    assert (nic.node, nic.path, nic.pci_bus_id, nic.bytes_per_s) == (None, (), "", None)
    assert nic.ports == (Port(number=1, layer=LinkLayer.UNKNOWN, gbit_s=None, up=True),)


def test_a_node_of_minus_one_is_not_known(tree: Tree) -> None:
    tree.rdma("mlx5_0", tree.pci("pci0000:00", "0000:01:00.0", node=-1), (IB, "100 Gb/sec", "4: ACTIVE"))
    assert discover(sysfs=tree.root)[0].node is None


def test_only_ports_that_are_up_are_used(two_sockets: Tree) -> None:
    assert chosen(two_sockets) == ["mlx5_0:1", "mlx5_1:1", "mlx5_1:2", "mlx5_10:1", "mlx5_bond_0:1"]


# -- choosing ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("mlx5_1", ["mlx5_1:1", "mlx5_1:2", "mlx5_10:1"]),
        ("=mlx5_1", ["mlx5_1:1", "mlx5_1:2"]),
        ("=mlx5_1:2,mlx5_0", ["mlx5_0:1", "mlx5_1:2"]),
        ("mlx5_0:1,mlx5_1:1", ["mlx5_0:1", "mlx5_1:1", "mlx5_10:1"]),
        ("^mlx5_1", ["mlx5_0:1", "mlx5_bond_0:1"]),
        ("^mlx5_1:2", ["mlx5_0:1", "mlx5_1:1", "mlx5_10:1", "mlx5_bond_0:1"]),
        ("^=mlx5_1,mlx5_bond_0", ["mlx5_0:1", "mlx5_10:1"]),
        ("=^mlx5_1,mlx5_bond_0", ["mlx5_0:1", "mlx5_10:1"]),
        (" mlx5_0 , mlx5_10:1", ["mlx5_0:1", "mlx5_10:1"]),
        ("mlx5_0,,", ["mlx5_0:1"]),
    ],
)
@pytest.mark.parametrize("option", ["own", "nccl"])
def test_ports_are_chosen_as_by_nccl(two_sockets: Tree, option: str, text: str, left: list[str]) -> None:
    assert chosen(two_sockets, **{option: text}) == left


def test_the_own_option_comes_first(two_sockets: Tree) -> None:
    assert chosen(two_sockets, own="=mlx5_0", nccl="=mlx5_10") == ["mlx5_0:1"]


def test_the_own_option_may_name_a_network_interface_beside_rdma(two_sockets: Tree) -> None:
    assert chosen(two_sockets, own="eth0") == ["eth0:1"]
    assert chosen(two_sockets, own="^mlx5") == ["eth0:1"]


@pytest.mark.parametrize(
    "text", ["^", "=", "^=", "^^mlx5", "==mlx5_0", ":1", "mlx5_0:", "mlx5_0:x", "mlx5_0:0", "mlx5_0:-1", "mlx5_0:²"]
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="NCCL_IB_HCA="):
        parse_nic_filter(text, source="NCCL_IB_HCA")


@pytest.mark.parametrize("options", [{"own": "mlx4"}, {"nccl": "mlx4"}, {"nccl": "^mlx5"}, {"own": "mlx5_down"}])
def test_an_option_that_leaves_nothing_is_refused(two_sockets: Tree, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"got none of .*mlx5_0:1.*mlx5_down:1 \(down\).*; mend or unset it"):
        chosen(two_sockets, **options)


# -- network interfaces ------------------------------------------------------------------------------------------
def test_network_interfaces_are_used_where_there_is_no_rdma(tree: Tree) -> None:
    tree.rdma("mlx5_0", None, (IB, "10 Gb/sec", "1: DOWN"))
    tree.net("lo", None, speed="", state="unknown", kind="772")
    tree.net("eth0", tree.pci("pci0000:00", "0000:01:00.0", node=1))
    tree.net("eth1", tree.pci("pci0000:00", "0000:02:00.0", node=0), state="down", speed="-1")
    tree.net("docker0", None, speed="-1")
    (nic,) = discover(sysfs=tree.root)
    assert (nic.name, nic.kind, nic.node, nic.bytes_per_s) == ("eth0", NicKind.NETWORK, 1, 25e9 / 8)
    assert nic.ports == (Port(number=1, layer=LinkLayer.ETHERNET, gbit_s=25.0, up=True),)
    assert [nic.name for nic in network_nics(tree.root)] == ["eth0", "eth1"]


def test_names_of_rdma_devices_do_not_choose_interfaces(tree: Tree) -> None:
    tree.net("eth0", None)
    assert chosen(tree, nccl="mlx5") == ["eth0:1"]
    with pytest.raises(ConfigError, match=r"CKPT_NICS='mlx5'.*eth0:1"):
        chosen(tree, own="mlx5")


def test_a_bond_is_used_and_its_parts_are_not(tree: Tree) -> None:
    bond = tree.net("bond0", None, speed="50000")
    (bond / "bonding").mkdir()
    part = tree.net("eth0", tree.pci("pci0000:00", "0000:01:00.0", node=1))
    link(part / "master", bond)
    bridge = tree.net("br0", None)
    (bridge / "bridge").mkdir()
    tree.net("veth1", None)
    assert chosen(tree) == ["bond0:1"]


def test_containers_have_virtual_interfaces_only(tree: Tree) -> None:
    tree.net("lo", None, kind="772")
    tree.net("eth0", None, speed="-1")
    (nic,) = discover(sysfs=tree.root)
    assert (nic.name, nic.bytes_per_s) == ("eth0", None)


def test_a_host_without_nics_has_none(tmp_path: Path) -> None:
    assert discover(sysfs=tmp_path) == ()
    assert discover(sysfs=tmp_path, nccl="mlx5", own="eth0") == ()


def test_this_machine_can_be_read() -> None:
    assert all(nic.ports for nic in discover())


# -- nearness ----------------------------------------------------------------------------------------------------
def test_the_nearest_nic_is_the_one_below_the_same_switch(two_sockets: Tree) -> None:
    nics = discover(sysfs=two_sockets.root)
    of = {nic.name: nic for nic in nics}
    gpu = place_of(GPU_0, two_sockets.root)
    assert gpu == Place(node=0, path=(*SWITCH_0, GPU_0))
    assert distance(of["mlx5_0"], gpu) == Distance(nearness=Nearness.SAME_SWITCH, shared=3)
    assert distance(of["mlx5_1"], gpu) == Distance(nearness=Nearness.SAME_ROOT, shared=1)
    assert distance(of["mlx5_bond_0"], gpu) == Distance(nearness=Nearness.SAME_NODE)
    assert distance(of["mlx5_10"], gpu) == Distance(nearness=Nearness.OTHER_NODE)
    assert [nic.name for nic in nearest(nics, gpu)] == ["mlx5_0"]
    assert [nic.name for nic in nearest(nics, place_of("00000000:9A:00.0", two_sockets.root))] == ["mlx5_10"]


def test_a_memory_node_is_near_all_its_nics(two_sockets: Tree) -> None:
    nics = discover(sysfs=two_sockets.root)
    assert [nic.name for nic in nearest(nics, Place(node=0))] == ["mlx5_0", "mlx5_1", "mlx5_bond_0"]
    assert [nic.name for nic in nearest(nics, Place(node=1))] == ["mlx5_10"]


def test_what_is_not_known_is_nearer_than_what_is_far(two_sockets: Tree) -> None:
    two_sockets.rdma("rxe0", None, (ROCE, "", "4: ACTIVE"))
    nics = discover(sysfs=two_sockets.root, own="rxe0,mlx5_10")
    assert [nic.name for nic in nearest(nics, Place(node=0))] == ["rxe0"]
    assert nearest(nics, Place()) == nics
    assert nearest((), Place()) == ()


@pytest.mark.parametrize("bus_id", ["", "GPU-1", "0000:ff:00.0"])
def test_a_gpu_that_the_system_does_not_know_has_no_place(two_sockets: Tree, bus_id: str) -> None:
    assert place_of(bus_id, two_sockets.root) == Place()
