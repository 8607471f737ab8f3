"""The engines of one update, from the control side: checked, locked, paused, attached, flushed and resumed together."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt_core import plugins
from ckpt_core.capability import Capability
from ckpt_core.config import Undo, UpdateConfig
from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.device import CPU
from ckpt_core.devices import visible_gpus
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import CkptError, ConfigError, EngineError, EngineStateError, EngineUnavailable
from ckpt_core.files import own_directory
from ckpt_core.in_flight import FATE_IN, InFlight

_FLUSH_RETRY_S = 0.2
_LAST_WORDS_S = 0.5  # what ranks said before their engine's attach call came back may still be on its way
_PAUSE_CAPABILITY = {
    PauseMode.ABORT: Capability.PAUSE_ABORT,
    PauseMode.WAIT: Capability.PAUSE_WAIT,
    PauseMode.KEEP: Capability.PAUSE_KEEP,
    PauseMode.IN_PLACE: Capability.PAUSE_KEEP,
    PauseMode.RETRACT: Capability.PAUSE_RETRACT,
}


@dataclass(slots=True, kw_only=True)
class Member:
    """One engine instance of the fleet.

    Attributes:
        endpoint, plugin: how to reach it.
        status: as of the last check.
        paused_here: this update paused it, so this update resumes it.
        requests: in flight when this update paused it; None where not told.
        attached: the blocking attach call.
        left_at: when it was first seen to have come back (`time.monotonic()`).
    """

    endpoint: Endpoint
    plugin: plugins.EnginePlugin
    status: EndpointStatus | None = None
    paused_here: bool = False
    requests: int | None = None
    attached: Future[None] | None = None
    left_at: float | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks that will dial in."""
        assert self.status is not None, "check the fleet first"
        return self.status.world_size

    @property
    def instance_id(self) -> str:
        """Which life of the engine the last check found; "" where it does not tell."""
        return self.status.instance_id if self.status is not None else ""

    @property
    def was_poisoned(self) -> bool:
        """Whether the last check found mixed weights."""
        return self.status is not None and self.status.state is EndpointState.POISONED

    def check(self) -> EndpointStatus:
        """Ask it what it is and does, and refuse what cannot be updated.

        Raises:
            EngineUnavailable: nothing answers, it is not that engine, or it is not up.
            EngineStateError: it sleeps, or is being updated.
        """
        if self.attached is not None and not self.attached.done():
            raise EngineStateError(f"{self.endpoint} still runs the attach call of an earlier update; restart it")
        status: EndpointStatus = self.plugin.hook.ckpt_ready(endpoint=self.endpoint)
        if status.engine != self.plugin.info.name:
            raise EngineUnavailable(
                f"{self.endpoint.url} is engine {status.engine!r}, expected {self.plugin.info.name!r}; name the right engine"
            )
        if remedy := _NOT_UPDATABLE.get(status.state):
            kind = EngineUnavailable if status.state in _NOT_UP else EngineStateError
            raise kind(f"{self.endpoint} is {status.state.value} ({status.detail or 'no reason given'}); {remedy}")
        self.status = status
        return status

    def check_same(self) -> None:
        """Raise EngineError where another instance answers than the one last checked, or this one may not serve.

        Raises:
            EngineUnavailable: nothing answers.
        """
        before, now = self.status, self.plugin.hook.ckpt_ready(endpoint=self.endpoint)
        assert before is not None, "check the fleet first"
        if before.instance_id and now.instance_id and now.instance_id != before.instance_id:
            raise EngineStateError(
                f"{self.endpoint} was restarted during the update (instance {now.instance_id}, expected {before.instance_id}): it "
                "has the weights it started with, and is not resumed; update it again"
            )
        if now.state in (EndpointState.POISONED, EndpointState.DEAD):
            raise EngineStateError(
                f"{self.endpoint} is {now.state.value} ({now.detail}); update it again, or restart it"
            )

    def serves(self) -> bool:
        """Whether it was resumed, also where the call that did it failed."""
        if not self.paused_here:
            return True
        try:
            return self.check().state is EndpointState.SERVING
        except CkptError:
            return False


_NOT_UP = (EndpointState.STARTING, EndpointState.DEAD)
_NOT_UPDATABLE = {
    EndpointState.STARTING: "wait until it is up",
    EndpointState.DEAD: "restart it",
    EndpointState.ASLEEP: "its weights are gone from the device: wake it first",
    EndpointState.UPDATING: "another update is running: wait for its end",
}


@dataclass(slots=True, kw_only=True)
class Fleet:
    """All members of an update."""

    members: Sequence[Member]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("an update needs at least one endpoint")
        urls = [member.endpoint.url for member in self.members]
        if len(set(urls)) != len(urls):
            raise ConfigError(f"the same endpoint is named twice: {', '.join(urls)}")

    def check(self) -> None:
        """Check all members; see `Member.check`."""
        self._each(lambda member: member.check(), self.members)

    def device_kind(self) -> DeviceKind:
        """Where all members hold their weights.

        Raises:
            ConfigError: some on CPU and some not: these cannot be updated together.
        """
        kinds = {member.status.device_kind for member in self.members if member.status is not None}
        if len(kinds) != 1:
            raise ConfigError("engines on CPU and on GPUs cannot be updated together; update them apart")
        return kinds.pop()

    def devices(self) -> tuple[str, ...]:
        """Devices that need an agent: one entry per rank on CPU, one per accelerator else."""
        found: list[str] = []
        for member in self.members:
            assert member.status is not None, "check the fleet first"
            if member.status.device_kind is DeviceKind.CPU:
                found += [CPU] * member.status.world_size
            else:
                uuids = member.status.device_uuids or visible_gpus()[: member.status.world_size]
                found += [uuid for uuid in uuids if uuid not in found]
        return tuple(found)

    def check_options(self, config: UpdateConfig) -> None:
        """Raise ConfigError where an option asks for what a member's plugin cannot do."""
        self.device_kind()
        needed = _PAUSE_CAPABILITY[config.pause_mode]
        for member in self.members:
            support = member.plugin.info.support(needed)
            if not support.usable:
                raise ConfigError(
                    f"{member.endpoint}: pause mode {config.pause_mode.value} is {support.level.value} ({support.detail}); "
                    "choose another"
                )
            if config.undo is Undo.SNAPSHOT and not member.plugin.has("ckpt_snapshot"):
                raise ConfigError(f"{member.endpoint}: its plugin makes no snapshots; use undo=REPLAY")

    def pause(self, mode: PauseMode) -> None:
        """Pause all members that serve."""
        serving = [member for member in self.members if _is_serving(member)]
        self._each(lambda member: self._pause_one(member, mode), serving)

    def _pause_one(self, member: Member, mode: PauseMode) -> None:
        member.paused_here = True  # also where the call fails half way: resume is harmless then
        member.requests = member.plugin.hook.ckpt_pause(endpoint=member.endpoint, mode=mode)

    def in_flight(self, mode: PauseMode, version: str) -> tuple[InFlight, ...]:
        """What the pause met, member by member, and which weights made its tokens if the update to `version` commits."""
        return tuple(
            InFlight(
                endpoint=member.endpoint.url,
                engine=member.plugin.info.name,
                requests=member.requests,
                fate=FATE_IN[mode],
                old_version=member.status.version if member.status is not None else "",
                new_version=version,
            )
            for member in self.members
        )

    def attach(self, rendezvous: Callable[[int], Rendezvous]) -> None:
        """Start the blocking attach call of every member."""
        for index, member in enumerate(self.members):
            member.left_at = None
            member.attached = _in_thread(
                partial(member.plugin.hook.ckpt_attach, endpoint=member.endpoint, rendezvous=rendezvous(index))
            )

    def check_attached(self) -> None:
        """Raise where an attach call came back although the update is not over, and no rank says why in time."""
        now = time.monotonic()
        for member in self.members:
            if member.attached is None or not member.attached.done():
                continue
            member.left_at = member.left_at or now
            if now - member.left_at >= _LAST_WORDS_S:
                member.attached.result()
                raise EngineError(f"{member.endpoint} left the update before its end; look into its log")

    def detach(self, timeout_s: float) -> bool:
        """Wait until all attach calls came back, however they did. Whether they all did in time."""
        calls = [member.attached for member in self.members if member.attached is not None]
        return not wait(calls, timeout=timeout_s).not_done

    def flush(self, *, accept_stale: bool, timeout_s: float) -> dict[str, EngineError]:
        """Drop the caches of all members, retried until it succeeds or the deadline is over. Errors of those that may not serve.

        These are members that refused to the end where a stale cache is not accepted, that are gone, and that are not the
        instance which was updated: a restarted engine has the weights it started with.
        """

        def settle(member: Member) -> EngineError | None:
            try:
                member.check_same()
                _flush(member, accept_stale=accept_stale, timeout_s=timeout_s)
            except EngineError as error:
                return error
            return None

        errors = self._each(settle, self.members)
        return {member.endpoint.url: error for member, error in zip(self.members, errors, strict=True) if error}

    def resume(self, version: str | None, *, only: Collection[str] | None = None) -> None:
        """Let members serve that this update paused: all, or those with these URLs."""
        paused = [
            member for member in self.members if member.paused_here and (only is None or member.endpoint.url in only)
        ]
        self._each(lambda member: _resume(member, version), paused)

    def resume_unchanged(self, urls: Collection[str]) -> None:
        """Let members with these URLs serve what they had, as far as this update paused them.

        Raises:
            EngineError: one could not; the others serve. It is another instance, is gone, or refused.
        """

        def resume(member: Member) -> None:
            try:
                member.check_same()
            except EngineUnavailable:
                member.check_same()  # it may have been busy
            _resume(member, None)

        self._each(resume, [member for member in self.members if member.paused_here and member.endpoint.url in urls])

    def close(self) -> None:
        """Close all clients; attach calls that still run are left to their own deadline."""
        for member in self.members:
            member.endpoint.close()

    def _each(self, call: Callable[[Member], Any], members: Sequence[Member]) -> list[Any]:
        """Call for all members at once; raises the first error after all came back, by their endpoints' deadlines."""
        with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="ckpt-call") as threads:
            futures = [threads.submit(call, member) for member in members]
            wait(futures)
            return [future.result() for future in futures]


def _resume(member: Member, version: str | None) -> None:
    member.plugin.hook.ckpt_resume(endpoint=member.endpoint, version=version)
    member.paused_here = False


def _in_thread(call: Callable[[], None]) -> Future[None]:
    """Run a call that may never come back: a daemon thread does not keep the process from ending."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 whoever asks the future gets it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="ckpt-attach", daemon=True).start()
    return future


class EndpointLocks:
    """Keeps two updates of this host from using the same endpoint: an flock per endpoint, gone with its process."""

    def __init__(self, root: Path) -> None:
        self._directory = root / f"ckpt-locks-{os.getuid()}"
        self._held = ExitStack()

    def __enter__(self) -> EndpointLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def take(self, url: str) -> None:
        """Lock an endpoint.

        Raises:
            EngineStateError: another process holds it.
        """
        own_directory(self._directory)
        name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
        file = self._held.enter_context((self._directory / name).open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineStateError(f"another update of {url} is running on this host; wait for its end") from None


def _is_serving(member: Member) -> bool:
    assert member.status is not None, "check the fleet first"
    return member.status.state is not EndpointState.PAUSED


def _flush(member: Member, *, accept_stale: bool, timeout_s: float) -> None:
    if not member.plugin.has("ckpt_flush_cache"):
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            member.plugin.hook.ckpt_flush_cache(endpoint=member.endpoint)
            return
        except EngineUnavailable:
            raise  # it is gone: the others need not wait for it
        except EngineError as error:
            if accept_stale:
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{member.endpoint} has the new weights but still a cache of the old ones, and stays paused: {error}"
                ) from error
            time.sleep(_FLUSH_RETRY_S)
