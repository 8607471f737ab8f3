"""Pause, resume and state of one SGLang engine, inside the process that holds its tokenizer manager.

Both roads come here: the HTTP routes of a server and the handle of an engine in the user's own process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, PauseMode, Rendezvous
from ckpt_core.errors import EngineError, EngineStateError
from ckpt_sglang import compat, compat_front

ENGINE = "sglang"
KEY = "ckpt"
_POLL_S = 0.01
_ABORT_AGAIN_S = 0.25


class EngineControl:
    """Of one tokenizer manager. Every coroutine runs in that manager's event loop.

    Attributes:
        updating: an attach call is running; the scheduler answers nothing meanwhile.
        refuses: why the engine refused tokens when it was last asked; "" where it did not.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.updating = False
        self.refuses = ""

    async def status(self) -> EndpointStatus:
        """What the engine is and does."""
        if self.updating:
            return EndpointStatus(
                engine=ENGINE, state=EndpointState.UPDATING, world_size=1, device_kind=DeviceKind.CPU, detail="attached"
            )
        facts = await self.facts()
        return EndpointStatus(
            engine=ENGINE,
            state=self._state(facts),
            world_size=facts["world_size"],
            device_kind=DeviceKind(facts["device_kind"]),
            instance_id=facts["instance_id"],
            version="" if facts["waiting"] else compat_front.served_version(self._manager, facts["version"]),
            detail=facts["refuses"],
        )

    async def facts(self) -> dict[str, Any]:
        """What the scheduler says, by way of its internal state.

        Raises:
            EngineStateError: this kind of engine cannot be updated.
            EngineError: the scheduler runs without this plugin.
        """
        compat.check_topology()
        states = await self._manager.get_internal_state()
        if len(states) != 1 or KEY not in states[0]:
            raise EngineError(
                "SGLang's scheduler does not have the ckpt plugin; install ckpt-core where the server runs, and name "
                '"ckpt" in SGLANG_PLUGINS if that is set'
            )
        facts: dict[str, Any] = states[0][KEY]
        self.refuses = facts["refuses"]
        return facts

    async def pause(self, mode: PauseMode, timeout_s: float) -> int:
        """No new request gets in; returns once no step runs. Number of requests in flight before.

        Raises:
            EngineStateError: requests did not end in time; the engine goes on as before.
        """
        in_flight = len(self._manager.rid_to_state)
        if mode is PauseMode.RETRACT and in_flight and not compat_front.flushes_with_waiting():
            raise EngineStateError(
                f"SGLang {compat.engine_version()} cannot flush its cache while {in_flight} retracted requests wait; "
                "pause with wait or abort"
            )
        if mode in (PauseMode.ABORT, PauseMode.WAIT):
            await self._drain(abort=mode is PauseMode.ABORT, timeout_s=timeout_s)
        await self._freeze("in_place" if mode in (PauseMode.KEEP, PauseMode.IN_PLACE) else "retract")
        return in_flight

    async def pause_scheduler(self) -> None:
        """Where only the way in is closed, as by /pause_generation with mode abort, let the scheduler pause as well."""
        if self._manager.is_pause and not (await self.facts())["paused"]:
            await self._freeze("retract")

    async def resume(self, version: str | None) -> None:
        """Serve again, as that version.

        Raises:
            EngineStateError: the weights are not known to be any one checkpoint.
        """
        if version is not None:
            await compat_front.name_version(self._manager, version)
        await self.check_may_serve()
        await self._manager.continue_generation(compat_front.continue_request())

    async def check_may_serve(self) -> None:
        """Ask the scheduler whether it would produce tokens.

        Raises:
            EngineStateError: it would not.
        """
        facts = await self.facts()
        if facts["refuses"] and not facts["waiting"]:
            raise EngineStateError(f"not resumed: {facts['refuses']}; update the weights, or restart the engine")

    async def attach(self, rendezvous: Rendezvous) -> None:
        """Make every rank take part; blocks until they are out.

        Raises:
            EngineError: it did not end in a commit on the first rank.
        """
        requests = compat_front.requests()
        request = requests.UpdateWeightsFromIPCReqInput(
            zmq_handles={KEY: encode(rendezvous)}, flush_cache=False, weight_version=None
        )
        success, message = await self._manager.update_weights_from_ipc(request, None)
        if not success:
            raise EngineError(message)
        self._manager.initial_weights_loaded = True

    async def flush(self) -> None:
        """Drop the caches.

        Raises:
            EngineError: refused, since requests still hold them.
        """
        result = await self._manager.flush_cache()
        if not result.success:
            raise EngineError(f"flush_cache is refused: {result.message or 'requests are running or queued'}")

    async def wake(self, tags: tuple[str, ...]) -> None:
        """Take released memory back."""
        request = compat_front.requests().ResumeMemoryOccupationReqInput(tags=list(tags) or None)
        await self._manager.resume_memory_occupation(request, None)

    def _state(self, facts: dict[str, Any]) -> EndpointState:
        if facts["asleep"]:
            return EndpointState.ASLEEP
        if facts["poisoned"]:
            return EndpointState.POISONED
        if facts["waiting"]:
            return EndpointState.WAITING_FOR_WEIGHTS
        if self._manager.is_pause:
            return EndpointState.PAUSED
        return EndpointState.STARTING if compat_front.is_starting(self._manager) else EndpointState.SERVING

    async def _drain(self, *, abort: bool, timeout_s: float) -> None:
        manager = self._manager
        async with manager.is_pause_cond:
            was_paused, manager.is_pause = manager.is_pause, True
        deadline = time.monotonic() + timeout_s
        abort_at = time.monotonic()
        while await manager.model_update_lock.is_locked():
            if abort and time.monotonic() >= abort_at:
                manager.abort_request(abort_all=True)
                abort_at = time.monotonic() + _ABORT_AGAIN_S
            if time.monotonic() > deadline:
                await self._unpause(was_paused)
                raise EngineStateError(
                    f"{len(manager.rid_to_state)} requests did not end within {timeout_s:g} s; wait longer, or pause with abort"
                )
            await asyncio.sleep(_POLL_S)

    async def _unpause(self, was_paused: bool) -> None:
        async with self._manager.is_pause_cond:
            self._manager.is_pause = was_paused
            self._manager.is_pause_cond.notify_all()

    async def _freeze(self, mode: str) -> None:
        await self._manager.pause_generation(compat_front.requests().PauseGenerationReqInput(mode=mode))
        await self._manager.get_internal_state()  # answered in order: the pause is done


def encode(rendezvous: Rendezvous) -> str:
    """As it travels in zmq_handles, a dict of strings."""
    import msgspec

    return msgspec.json.encode(dataclasses.asdict(rendezvous)).decode()


def control_of(manager: Any) -> EngineControl:
    """The control of a tokenizer manager: one for its whole life."""
    found: EngineControl | None = getattr(manager, "_ckpt_control", None)
    if found is None:
        found = EngineControl(manager)
        manager._ckpt_control = found
    return found
