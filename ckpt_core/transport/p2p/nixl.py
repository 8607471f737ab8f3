"""Reads by NVIDIA NIXL over UCX (ai-dynamo/nixl): RDMA, shared memory on one host, TCP; whichever UCX finds best."""

from __future__ import annotations

import base64
import binascii
import importlib
import secrets
from collections.abc import Sequence
from typing import Any

from ckpt_core.errors import PeerLost, TransportError
from ckpt_core.transport.p2p.base import Library, Memory, OneSided, Pending, Read

MODULES = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")  # by wheel
_BACKEND = "UCX"
_PROGRESS_EVERY_US = (
    200  # where others read: without it the library's thread spins on a core of its own, measured at 97 %
)
_HOST, _GPU = "DRAM", "VRAM"
_DONE, _FAILED = "DONE", "ERR"


class Nixl(OneSided):
    """See the module.

    Args:
        devices: names of the NICs to use, as UCX calls them; all where empty.
        serves: whether others read here. Over TCP the library's thread then answers them, looking every so often.

    Raises:
        TransportError: it is not installed, or does not start.
    """

    library = Library.NIXL

    def __init__(self, *, devices: Sequence[str] = (), serves: bool = False) -> None:
        api = _load()
        self._name = f"ckpt-{secrets.token_hex(8)}"
        try:
            config = api.nixl_agent_config(backends=[], enable_prog_thread=False)
            self._agent: Any = api.nixl_agent(self._name, config)
            if serves:
                self._agent.agent = _answering(api.nixlBind, self._name)
            self._agent.create_backend(_BACKEND, {"ucx_devices": ",".join(devices)} if devices else {})
        except Exception as error:
            raise TransportError(f"NIXL does not start ({error!r}); are the devices {list(devices)} there?") from error
        self._exposed: dict[int, tuple[Memory, Any]] = {}

    def expose(self, memory: Memory) -> None:
        """See OneSided."""
        kind = _HOST if memory.gpu is None else _GPU
        try:
            region = (memory.address, memory.size_bytes, memory.gpu or 0, "")
            self._exposed[memory.address] = memory, self._agent.register_memory([region], kind)
        except Exception as error:
            raise TransportError(f"NIXL cannot register {memory.size_bytes} bytes of {kind}: {error!r}") from error

    def withdraw(self, memory: Memory) -> None:
        """See OneSided."""
        self._agent.deregister_memory(self._exposed.pop(memory.address)[1])

    def contact(self) -> str:
        """See OneSided: the agent's metadata, which names every region."""
        return base64.b64encode(self._agent.get_agent_metadata()).decode("ascii")

    def connect(self, contact: str) -> str:
        """See OneSided."""
        try:
            metadata = base64.b64decode(contact, validate=True)
        except (ValueError, binascii.Error) as error:
            raise TransportError(
                f"expected metadata of a NIXL owner, got {contact!r:.100}; was it made by another library?"
            ) from error
        try:
            return str(self._agent.add_remote_agent(metadata).decode())
        except Exception as error:
            raise PeerLost(f"NIXL cannot reach the owner ({error!r}); read from another one") from error

    def read(self, owner: str, reads: Sequence[Read]) -> Pending:
        """See OneSided. All of `reads` land in memory of one kind."""
        gpu = self._gpu_of(reads[0].local)
        local = [(read.local, read.size_bytes, gpu or 0) for read in reads]
        remote = [(read.remote, read.size_bytes, 0) for read in reads]
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(local, _HOST if gpu is None else _GPU),
                self._agent.get_xfer_descs(remote, _HOST),
                owner,
            )
            state = self._agent.transfer(handle)
        except Exception as error:
            raise _lost(owner, repr(error)) from error
        return _Transfer(self._agent, owner, handle, state)

    def _gpu_of(self, address: int) -> int | None:
        for memory, _ in self._exposed.values():
            if memory.address <= address < memory.address + memory.size_bytes:
                return memory.gpu
        raise TransportError(f"address {address:#x} is in no memory that is exposed here; expose the ring first")

    def close(self) -> None:
        """See OneSided."""
        for memory, _ in list(self._exposed.values()):
            self.withdraw(memory)
        self._agent = None


class _Transfer(Pending):
    def __init__(self, agent: Any, owner: str, handle: Any, state: str) -> None:
        self._agent = agent
        self._owner = owner
        self._handle = handle
        self._state = state

    def arrived(self) -> bool:
        """See Pending."""
        if self._state not in {_DONE, _FAILED}:
            try:
                self._state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                raise _lost(self._owner, repr(error)) from error
        if self._state == _FAILED:
            raise _lost(self._owner, "failed")
        if self._state == _DONE and self._handle is not None:
            self._agent.release_xfer_handle(self._handle)
            self._handle = None
        return self._state == _DONE


def _answering(bindings: Any, name: str) -> Any:
    """An agent whose thread sleeps between looks, which the Python interface has no option for."""
    config = bindings.nixlAgentConfig()
    config.useProgThread, config.pthrDelay = True, _PROGRESS_EVERY_US
    return bindings.nixlAgent(name, config)


def _load() -> Any:
    errors = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            errors.append(str(error))
    raise TransportError(
        f"NIXL cannot be loaded ({'; '.join(errors)}); pip install nixl-cu12 (or nixl-cu13), or choose mooncake"
    )


def _lost(owner: str, what: str) -> PeerLost:
    return PeerLost(
        f"a read from {owner}: {what}; the owner is gone, cannot be reached, or does not expose that memory any more; "
        "read from another one"
    )
