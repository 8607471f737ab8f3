"""Which node a GPU is at, and binding to it: on made-up machines, and once on this one."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from ckpt_core import numa
from ckpt_core.numa import Binding, LinuxKernel

GPU = "0000:17:00.0"


class FakeKernel:
    def __init__(self, allowed: set[int], *, cpus_fail: bool = False, memory_fails: bool = False) -> None:
        self.allowed = frozenset(allowed)
        self.preferred: int | None = None
        self._cpus_fail = cpus_fail
        self._memory_fails = memory_fails

    def allowed_cpus(self) -> frozenset[int]:
        return self.allowed

    def run_on(self, cpus: frozenset[int]) -> None:
        if self._cpus_fail:
            raise OSError("not permitted")
        self.allowed = cpus

    def prefer_memory(self, node: int | None) -> None:
        if self._memory_fails:
            raise OSError("not permitted")
        self.preferred = node


def sysfs(root: Path, cpulists: dict[int, str], gpus: dict[str, str]) -> Path:
    """A tree with these nodes, and these nodes of PCI devices."""
    base = root / "devices/system/node"
    base.mkdir(parents=True)
    (base / "online").write_text(",".join(map(str, cpulists)) + "\n")
    for node, cpus in cpulists.items():
        (base / f"node{node}").mkdir()
        (base / f"node{node}/cpulist").write_text(cpus + "\n")
    for address, node in gpus.items():
        device = root / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(node + "\n")
    return root


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    return sysfs(tmp_path, {0: "0-3,8", 1: "4-7,9"}, {GPU: "1", "0000:ca:00.0": "0", "0001:03:00.0": "-1"})


def test_nodes_and_their_cpus_are_read(two_nodes: Path) -> None:
    assert numa.nodes(two_nodes) == (0, 1)
    assert numa.cpus_of(0, two_nodes) == {0, 1, 2, 3, 8}
    assert numa.cpus_of(5, two_nodes) == frozenset()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", {0}), ("0-1\n", {0, 1}), ("0,2-3", {0, 2, 3}), ("", set()), ("odd", set()), ("3-x", set())],
)
def test_the_kernels_lists_of_numbers(tmp_path: Path, text: str, numbers: set[int]) -> None:
    path = tmp_path / "devices/system/node/online"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert set(numa.nodes(tmp_path)) == numbers


@pytest.mark.parametrize(
    ("bus_id", "node"),
    [
        (GPU, 1),
        ("00000000:17:00.0", 1),
        ("0000:CA:00.0", 0),
        ("00000000:CA:00.0\n", 0),
        ("0001:03:00.0", None),
        ("0000:99:00.0", None),
        ("../../../0000:17:00.0", None),
        ("", None),
    ],
)
def test_the_node_of_a_gpu_by_either_form_of_its_address(two_nodes: Path, bus_id: str, node: int | None) -> None:
    assert numa.node_of(bus_id, two_nodes) == node


def test_binding_takes_the_allowed_cpus_of_the_node_and_its_memory(two_nodes: Path) -> None:
    kernel = FakeKernel({0, 1, 4, 5})
    binding = numa.bind(GPU, sysfs=two_nodes, kernel=kernel)
    assert binding == Binding(node=1, cpus=frozenset({4, 5}), memory=True)
    assert (kernel.allowed, kernel.preferred) == ({4, 5}, 1)


def test_one_node_is_left_alone(tmp_path: Path) -> None:
    kernel = FakeKernel({0, 1})
    binding = numa.bind(GPU, sysfs=sysfs(tmp_path, {0: "0-1"}, {GPU: "0"}), kernel=kernel)
    assert binding == Binding(reason="the machine has one memory node")
    assert (kernel.allowed, kernel.preferred) == ({0, 1}, None)


@pytest.mark.parametrize("bus_id", ["0001:03:00.0", "0000:99:00.0", "nonsense"])
def test_a_gpu_of_no_known_node_is_left_alone(two_nodes: Path, bus_id: str) -> None:
    kernel = FakeKernel({0, 4})
    binding = numa.bind(bus_id, sysfs=two_nodes, kernel=kernel)
    assert binding.node is None
    assert bus_id in binding.reason
    assert (kernel.allowed, kernel.preferred) == ({0, 4}, None)


def test_no_sysfs_at_all_is_a_reason_not_an_error(tmp_path: Path) -> None:
    assert numa.bind(GPU, sysfs=tmp_path / "missing", kernel=FakeKernel({0})).reason


def test_where_none_of_its_cpus_is_allowed_memory_alone_is_bound(two_nodes: Path) -> None:
    kernel = FakeKernel({0, 1})
    binding = numa.bind(GPU, sysfs=two_nodes, kernel=kernel)
    assert (binding.node, binding.cpus, binding.memory) == (1, frozenset(), True)
    assert "none of the CPUs of node 1" in binding.reason
    assert kernel.allowed == {0, 1}


def test_where_the_memory_policy_is_forbidden_cpus_are_bound(two_nodes: Path) -> None:
    binding = numa.bind(GPU, sysfs=two_nodes, kernel=FakeKernel({4}, memory_fails=True))
    assert (binding.node, binding.cpus, binding.memory) == (1, frozenset({4}), False)
    assert binding.reason == "memory: not permitted"


def test_where_all_is_forbidden_nothing_is_bound(two_nodes: Path) -> None:
    binding = numa.bind(GPU, sysfs=two_nodes, kernel=FakeKernel({4}, cpus_fail=True, memory_fails=True))
    assert (binding.node, binding.cpus, binding.memory) == (None, frozenset(), False)
    assert binding.reason == "CPUs: not permitted; memory: not permitted"


@pytest.mark.parametrize("memory_fails", [False, True])
def test_a_block_at_a_node_ends_where_it_began(two_nodes: Path, *, memory_fails: bool) -> None:
    kernel = FakeKernel({0, 4}, memory_fails=memory_fails)
    with contextlib.suppress(KeyError), numa.at(GPU, sysfs=two_nodes, kernel=kernel) as binding:
        assert binding.cpus == kernel.allowed == {4}
        raise KeyError
    assert (kernel.allowed, kernel.preferred) == ({0, 4}, None)


# -- this machine --------------------------------------------------------------------------------------------------------
def in_a_thread(act: object) -> list[object]:
    """Affinity and policy are a thread's own: what a test does to them ends with its thread."""
    said: list[object] = []
    thread = threading.Thread(target=lambda: said.append(act()))
    thread.start()
    thread.join(20)
    return said


def test_the_real_kernel_takes_affinity_and_policy() -> None:
    def act() -> object:
        kernel = LinuxKernel()
        one = frozenset({min(kernel.allowed_cpus())})
        kernel.run_on(one)
        try:
            kernel.prefer_memory(0)
            kernel.prefer_memory(None)
        except PermissionError:
            pass  # as in containers that forbid the call; `bind` goes on without
        return kernel.allowed_cpus() == one

    before = LinuxKernel().allowed_cpus()
    assert in_a_thread(act) == [True]
    assert LinuxKernel().allowed_cpus() == before


def test_an_impossible_node_is_an_os_error() -> None:
    def act() -> object:
        with pytest.raises(OSError, match="set_mempolicy"):
            LinuxKernel().prefer_memory(1000)
        return True

    assert in_a_thread(act) == [True]


def test_an_unknown_architecture_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="vax"):
        LinuxKernel().prefer_memory(0)
