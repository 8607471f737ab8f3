"""The driver's calls of a measurement, on a driver of our own: all that is taken is given back, whatever fails."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator

import pytest

from ckpt_core import limits as limits_module
from ckpt_core.cuda import driver, probe
from ckpt_core.errors import CapacityError, TransportError
from ckpt_core.limits import identify, measure


@pytest.fixture(autouse=True)
def small_host_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_THREAD_BYTES", 1 << 16)


class FakeDriver:
    """Counts what is taken and given back, refuses what a real driver refuses, and can fail one call."""

    def __init__(self, count: int = 2, *, failing: str = "", peers: bool = True) -> None:
        self.count = count
        self.failing = failing
        self.peers = peers
        self.held: Counter[str] = Counter()
        self.current = 0
        self.calls: Counter[str] = Counter()
        self._next = 0x1000

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return self._call(name)

    def _call(self, name: str) -> object:
        body = getattr(type(self), f"{name}_body", lambda *_: 0)

        def call(*args: object) -> int:
            self.calls[name] += 1
            if name == self.failing:
                return 2 if "Alloc" in name else 700
            return body(self, *args)

        return call

    def _take(self, kind: str, target: object) -> int:
        self.held[kind] += 1
        self._next += 0x1000
        target._obj.value = self._next
        return 0

    def _give(self, kind: str) -> int:
        self.held[kind] -= 1
        assert self.held[kind] >= 0, kind
        return 0

    def cuGetErrorName_body(self, status: int, name: object) -> int:  # noqa: N802
        name._obj.value = b"FAKE"
        return 0

    def cuDeviceGetCount_body(self, target: object) -> int:  # noqa: N802
        target._obj.value = self.count
        return 0

    def cuDeviceGet_body(self, target: object, ordinal: int) -> int:  # noqa: N802
        target._obj.value = ordinal
        return 0

    def cuDeviceGetUuid_v2_body(self, raw: object, device: object) -> int:  # noqa: N802
        raw._obj[0] = device.value
        return 0

    def cuDeviceGetName_body(self, text: object, size: int, device: int) -> int:  # noqa: N802
        text.value = b"Fake GPU"
        return 0

    def cuDeviceGetPCIBusId_body(self, text: object, size: int, device: int) -> int:  # noqa: N802
        text.value = f"0000:{device:02x}:00.0".encode()
        return 0

    def cuDriverGetVersion_body(self, target: object) -> int:  # noqa: N802
        target._obj.value = 13010
        return 0

    def cuDevicePrimaryCtxRetain_body(self, target: object, device: object) -> int:  # noqa: N802
        self.held["context"] += 1
        target._obj.value = 1 + device.value
        return 0

    def cuDevicePrimaryCtxRelease_v2_body(self, device: object) -> int:  # noqa: N802
        return self._give("context")

    def cuCtxSetCurrent_body(self, handle: object) -> int:  # noqa: N802
        self.current = handle.value
        return 0

    def cuCtxGetCurrent_body(self, target: object) -> int:  # noqa: N802
        target._obj.value = self.current
        return 0

    def cuMemAlloc_v2_body(self, target: object, size: int) -> int:  # noqa: N802
        return self._take("memory", target)

    def cuMemFree_v2_body(self, pointer: int) -> int:  # noqa: N802
        return self._give("memory")

    def cuMemHostRegister_v2_body(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        self.held["registered"] += 1
        return 0

    def cuMemHostUnregister_body(self, pointer: int) -> int:  # noqa: N802
        return self._give("registered")

    def cuStreamCreate_body(self, target: object, flags: int) -> int:  # noqa: N802
        return self._take("stream", target)

    def cuStreamDestroy_v2_body(self, stream: object) -> int:  # noqa: N802
        return self._give("stream")

    def cuDeviceCanAccessPeer_body(self, target: object, device: int, peer: int) -> int:  # noqa: N802
        target._obj.value = self.peers
        return 0

    def cuCtxEnablePeerAccess_body(self, handle: object, flags: int) -> int:  # noqa: N802
        assert handle.value != self.current
        self.held["peer"] += 1
        return 0

    def cuCtxDisablePeerAccess_body(self, handle: object) -> int:  # noqa: N802
        assert handle.value != self.current
        return self._give("peer")

    def cuMemcpyPeerAsync_body(  # noqa: N802, PLR0917
        self, to: int, to_context: object, source: int, source_context: object, size: int, stream: object
    ) -> int:
        assert to_context.value == self.current != source_context.value
        assert to != source
        assert size == probe.CudaDevices.size_bytes
        return 0


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def install(**more: object) -> FakeDriver:
        fake = FakeDriver(**more)
        monkeypatch.setattr(driver, "library", lambda: fake)
        probe._cuda.cache_clear()
        return fake

    monkeypatch.setattr(probe, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(probe.CudaDevices, "size_bytes", 1 << 16)
    yield install
    probe._cuda.cache_clear()


def test_every_call_of_a_measurement_and_all_given_back(fake_driver: object) -> None:
    fake = fake_driver()
    with probe.open_gpus() as devices:
        found = measure(identify(), devices, 0.2)
        assert fake.held == {"context": 2, "memory": 2, "registered": 2, "stream": 2, "peer": 2}
    assert +fake.held == Counter()
    assert [(peer.reader, peer.owner) for peer in found.peers] == [(0, 1), (1, 0)]
    assert len(found.h2d_gb_s) == len(found.d2d_gb_s) == 2
    assert found.machine.driver_version.endswith("CUDA 13.1")
    assert found.machine.gpus[1].pci_bus_id == "0000:01:00.0"
    assert min(fake.calls[name] for name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2", "cuMemcpyPeerAsync")) > 0


def test_pairs_without_peer_access_are_left_out(fake_driver: object) -> None:
    fake = fake_driver(peers=False)
    with probe.open_gpus() as devices:
        assert measure(identify(), devices, 0.1).peers == ()
    assert fake.calls["cuMemcpyPeerAsync"] == 0


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("cuMemAlloc_v2", CapacityError),
        ("cuMemHostRegister_v2", TransportError),
        ("cuStreamCreate", TransportError),
        ("cuMemcpyPeerAsync", TransportError),
        ("cuCtxEnablePeerAccess", TransportError),
    ],
)
def test_a_call_that_fails_is_an_error_and_leaves_nothing_behind(
    fake_driver: object, call: str, error: type[Exception]
) -> None:
    fake = fake_driver(failing=call)
    with pytest.raises(error, match="FAKE"), probe.open_gpus() as devices:
        measure(identify(), devices, 0.1)
    assert +fake.held == Counter()


def test_the_signatures_do_not_fight_with_the_drivers() -> None:
    for name in driver._SIGNATURES.keys() & probe._SIGNATURES.keys():
        assert driver._SIGNATURES[name] == probe._SIGNATURES[name]
    assert probe._SIGNATURES["cuMemcpyPeerAsync"].count(ctypes.c_void_p) == 3
