"""The agents of one lane, one a host, joined for collectives: joined once per fleet and kept over updates.

Joining and leaving NCCL takes as long as a whole update (0.16 s and 0.85 s measured), so nobody does it per update. Backends
are made without torch's default group, so that an agent may live in a trainer that has one of its own.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ckpt_core.device import Mark
from ckpt_core.errors import ConfigError, PeerLost, RendezvousTimeout, TransportError
from ckpt_core.transport.peers import Membership, Peers

_JOIN_POLL_S = 1e-3


class MeetingPoint:
    """The key-value store at which the agents of a fleet find each other; not needed any more when all have joined.

    Whoever reaches the port can read and write it: bind it to an address of the cluster's own network.

    Attributes:
        address: host name or IP address that it is bound to.
        port: chosen by the system.
    """

    def __init__(self, address: str, *, timeout_s: float = 60.0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, 0), family=family)
        self.address, self.port = address, int(listening.getsockname()[1])
        self._store: TCPStore | None = TCPStore(
            address,
            self.port,
            is_master=True,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._store = None


class CollectiveGroup:
    """One host's place in a lane.

    Lifecycle: `join` on all hosts at the same time; then for each update `begin`, `tell` / `agreed` / `broadcast` as often as
    needed, `end`; and `close` once. After `abort` the group is broken for good, on all hosts: each of them sees it.

    Attributes:
        me: the place.
        device: where tensors for `broadcast` must be.
    """

    def __init__(self, me: Membership, device: torch.device, backend: Any, peers: Peers) -> None:
        self.me = me
        self.device = device
        self._backend: Any = backend
        self._aborted: Any = None
        self._peers = peers
        self._round = 1
        self._digest = 0
        self._told = 0

    @classmethod
    def join(
        cls, me: Membership, *, backend: str, device: torch.device, store: tuple[str, int], timeout_s: float
    ) -> CollectiveGroup:
        """Meet the other hosts of the lane, and send one byte around, so that the first update finds all connections made.

        Args:
            me: this host's place.
            backend: "nccl", "gloo", or one that a package registered with torch, such as "hccl".
            device: where rings are.
            store: address and port of the meeting point.
            timeout_s: for all of it; also how long gloo waits for a silent host in a later broadcast.

        Raises:
            RendezvousTimeout: not all hosts came in time.
            ConfigError: there is no such backend here.
        """
        deadline = time.monotonic() + timeout_s
        make = _maker(backend)
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            root = TCPStore(store[0], store[1], is_master=False, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise RendezvousTimeout(f"lane {me.lane}: no meeting point at {store[0]}:{store[1]} ({error})") from error
        root.set_timeout(timeout)
        peers = Peers.connect(PrefixStore(f"{me.lane}/peers", root), me, deadline)
        try:
            made = make(PrefixStore(f"{me.lane}/{backend}", root), me, device, timeout)
        except RuntimeError as error:
            peers.close(goodbye=False)
            raise RendezvousTimeout(
                f"lane {me.lane}: {backend} did not connect all {me.hosts} hosts: {error}; see the other agents' logs"
            ) from error
        group = cls(me, device, made, peers)
        group._warm_up(deadline)
        return group

    @property
    def broken(self) -> bool:
        """Whether it was aborted or closed."""
        return self._backend is None

    def begin(self, digest: int) -> None:
        """An update begins; `digest` of the schedule that all hosts follow.

        Raises:
            PeerLost: the group is broken.
        """
        if self.broken:
            raise PeerLost(f"lane {self.me.lane}: this group was aborted; join the lane anew")
        self._digest = digest
        self._told = 0

    def tell(self, ready: int) -> None:
        """Say that this host can do its part of the first `ready` batches."""
        self._told = ready
        self._peers.tell(self._round, ready, self._digest)

    def agreed(self, most: int) -> int:
        """How many batches all other hosts are ready for, at most `most`. Raises PeerLost, TransportError."""
        self._peers.listen()
        return self._peers.agreed(self._round, self._digest, most)

    def check(self) -> None:
        """Raise PeerLost where another host went away."""
        self._peers.listen()

    def behind(self, ready: int) -> list[int]:
        """Hosts that are not ready for that many batches."""
        return self._peers.behind(self._round, ready)

    def broadcast(self, regions: Sequence[tuple[torch.Tensor, int]]) -> Mark:
        """Start broadcasts of tensors, each from a host, as one launch where the backend can. All hosts call this alike.

        Returns:
            a mark that is reached when all bytes are there; its `reached` raises PeerLost where they never will be.
        """
        backend = self._backend
        with self._failures():
            if len(regions) > 1 and _groups_launches(backend):
                backend._start_coalescing()
                for tensor, source in regions:
                    backend.broadcast([tensor], _from(source))
                return _Works([backend._end_coalescing()], self)
            return _Works([backend.broadcast([tensor], _from(source)) for tensor, source in regions], self)

    def end(self) -> None:
        """The update is through: all that was told was broadcast and has arrived here."""
        if self._told:
            self._round += 1
            self._told = 0

    def abort(self) -> None:
        """End broadcasts in flight, here and, as they notice, on the other hosts. Idempotent."""
        backend, self._backend = self._backend, None
        if backend is None:
            return
        self._peers.close(goodbye=False)
        self._aborted = backend  # to let go of gloo is to wait for its threads: not in the middle of an update
        with contextlib.suppress(RuntimeError, AttributeError):  # gloo has nothing to abort: its waits have a deadline
            backend.abort()

    def close(self) -> None:
        """Leave. Waits for what gloo has in flight, at most its timeout. Idempotent."""
        if self._backend is not None:
            try:
                self._peers.listen()
            except PeerLost:
                self.abort()  # a dead peer does not take part in a shutdown
        self._aborted = None
        backend, self._backend = self._backend, None
        if backend is None:
            return
        self._peers.close(goodbye=True)
        with contextlib.suppress(RuntimeError, AttributeError):
            backend.shutdown()

    def _warm_up(self, deadline: float) -> None:
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        mark = self.broadcast([(byte, 0)])
        try:
            while not mark.reached():
                self.check()
                if time.monotonic() > deadline:
                    raise RendezvousTimeout(
                        f"lane {self.me.lane}: the first byte did not come around; see the agents' logs"
                    )
                time.sleep(_JOIN_POLL_S)
        except TransportError:
            self.abort()
            raise

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(
                f"lane {self.me.lane}: a broadcast failed on host {self.me.host}: {error}; see the logs of the other hosts' agents"
            ) from error


class _Works:
    """Broadcasts under way, as a mark."""

    def __init__(self, works: list[Any], group: CollectiveGroup) -> None:
        self._works = deque(work for work in works if work is not None)
        self._group = group
        self._on_device = group.device.type != "cpu"

    def reached(self) -> bool:
        while self._works:
            work = self._works[0]
            if not work.is_completed():
                return False
            with self._group._failures():
                # On a device `wait` only queues; a failure there counts as complete, too.
                if self._on_device and (failure := _failure_of(work)) is not None:
                    raise RuntimeError(str(failure))
                work.wait()
            self._works.popleft()
        return True


def _failure_of(work: Any) -> object | None:
    """What made a completed piece of work fail. Some builds of torch cannot hand it to Python: then the peers' own
    connections have to tell of a death."""
    try:
        found: object | None = work.exception()
    except TypeError:
        return None
    return found


def _from(source: int) -> distributed.BroadcastOptions:
    options = distributed.BroadcastOptions()
    options.rootRank = source
    if hasattr(options, "asyncOp"):
        options.asyncOp = True
    return options


def _groups_launches(backend: Any) -> bool:
    return bool(getattr(backend, "supports_coalescing", False)) and hasattr(backend, "_start_coalescing")


# -- backends ----------------------------------------------------------------------------------------------------
_Make = Callable[[Store, Membership, torch.device, datetime.timedelta], Any]


def _maker(name: str) -> _Make:
    known: dict[str, _Make] = {"gloo": _gloo, "nccl": _nccl}
    if name in known:
        return known[name]
    plugin = distributed.Backend._plugins.get(name.upper())
    if plugin is None:
        raise ConfigError(
            f"no collective backend {name!r}; known: gloo, nccl, and what packages register with torch (import them first)"
        )
    return lambda store, me, _device, timeout: _registered(plugin, store, me, timeout)


def _gloo(store: Store, me: Membership, _device: torch.device, timeout: datetime.timedelta) -> Any:
    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()
    options._timeout = timeout
    options._devices = [kind.create_device(hostname=me.address)]
    return kind(store, me.host, me.hosts, options)


def _nccl(store: Store, me: Membership, device: torch.device, _timeout: datetime.timedelta) -> Any:
    kind: Any = getattr(distributed, "ProcessGroupNCCL", None)
    if kind is None:
        raise ConfigError("this torch was built without NCCL; install one with CUDA, or use gloo")
    torch.cuda.set_device(device)
    # Else torch's watchdog ends the whole process when a peer dies or its communicator is aborted. Deadlines are ours.
    os.putenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = kind.Options()
    options._timeout = datetime.timedelta(days=1)
    return kind(store, me.host, me.hosts, options)


def _registered(plugin: Any, store: Store, me: Membership, timeout: datetime.timedelta) -> Any:
    if not plugin.extended_api:
        return plugin.creator_fn(store, me.host, me.hosts, timeout)
    from torch._C._distributed_c10d import _DistributedBackendOptions

    options = _DistributedBackendOptions()
    options.store, options.group_rank, options.group_size = store, me.host, me.hosts
    options.timeout, options.group_id = timeout, me.lane
    options.global_ranks_in_group = list(range(me.hosts))
    return plugin.creator_fn(options, None)
