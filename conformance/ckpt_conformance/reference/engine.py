"""The engine's thread: steps the scheduler on the rank processes, and carries out control calls between two steps."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import wait
from typing import Any, TypeVar

from ckpt_conformance.reference import messages
from ckpt_conformance.reference.messages import Reply
from ckpt_conformance.reference.options import ENGINE_NAME
from ckpt_conformance.reference.ranks import RankPool
from ckpt_conformance.reference.requests import FinishReason, Request
from ckpt_conformance.reference.scheduler import Scheduler
from ckpt_core.contract import (
    AttachResult,
    DeviceKind,
    EndpointState,
    EndpointStatus,
    PauseMode,
    Rendezvous,
)
from ckpt_core.errors import CkptError, EngineStateError, EngineUnavailable

T = TypeVar("T")
_STOP_TIMEOUT_S = 3.0
_STATES_THAT_QUEUE = (
    EndpointState.SERVING,
    EndpointState.PAUSED,
    EndpointState.UPDATING,
    EndpointState.ASLEEP,
)
_FIRST_REASONS = (EndpointState.POISONED, EndpointState.ASLEEP, EndpointState.WAITING_FOR_WEIGHTS)
_log = logging.getLogger(__name__)


class Engine:
    """One engine instance over its ranks. Calls may come from any thread; control calls return futures.

    Attributes:
        version: of the weights that produce tokens now.
        ready: completed when the ranks have their weights; with an error where they could not start.
    """

    def __init__(self, pool: RankPool, scheduler: Scheduler, *, device_kind: DeviceKind, version: str = "") -> None:
        self.version = version
        self.ready: Future[None] = Future()
        self._pool, self._scheduler, self._device_kind = pool, scheduler, device_kind
        self._lock = threading.RLock()  # guards the scheduler and all that follows
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._replies: list[Reply] = []
        self._pause_waiters: list[Future[int]] = []
        self._dead_cause = ""
        self._updating = False
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- from any thread -------------------------------------------------------------------
    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End requests, ranks and thread. Returns within a few seconds."""
        with self._lock:
            self._stopping = True
            self._scheduler.end_all(FinishReason.ABORT)
        self._wake()
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._pool.kill()  # whatever it waits for fails now
            self._thread.join(_STOP_TIMEOUT_S)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def status(self) -> EndpointStatus:
        """What it does now. Never waits for a rank."""
        state, detail = self._state()
        return EndpointStatus(
            engine=ENGINE_NAME,
            state=state,
            world_size=self._pool.options.tp_size,
            device_kind=self._device_kind,
            instance_id=self._pool.options.instance_id,
            version=self.version,
            device_uuids=self._device_uuids(),
            detail=detail,
        )

    def load(self) -> dict[str, Any]:
        """Requests running and waiting, and the pause mode."""
        with self._lock:
            mode = self._scheduler.pause_mode
            return {
                "running": len(self._scheduler.running),
                "waiting": len(self._scheduler.waiting),
                "pause_mode": mode.value if mode else None,
            }

    def submit(self, request: Request) -> None:
        """Take a request in.

        Raises:
            EngineUnavailable: dead, poisoned, starting, or without weights.
            EngineStateError: the queue is full.
        """
        with self._lock:
            state, detail = self._state()
            if state not in _STATES_THAT_QUEUE:
                raise EngineUnavailable(f"the engine is {state.value}: {detail}")
            if self._scheduler.full:
                limit = self._scheduler.max_waiting
                raise EngineStateError(f"{limit} requests wait already; try again later")
            self._scheduler.add(request)
        self._wake()

    def cancel(self, request_id: int) -> None:
        """Forget a request; no error where it is over."""
        with self._lock:
            self._scheduler.cancel(request_id)
        self._wake()

    def pause(self, mode: PauseMode) -> Future[int]:
        """Stop stepping; the result comes once nothing runs: the number of requests in flight."""
        result: Future[int] = Future()
        started = self._post(lambda: self._pause(mode, result))
        started.add_done_callback(lambda done: _pass_error(done, result))
        return result

    def resume(self, version: str | None) -> Future[None]:
        """Serve again, as that version where one is named."""
        return self._post(lambda: self._resume(version))

    def flush_cache(self) -> Future[None]:
        """Drop the prefix cache; refused while requests hold keys and values."""
        return self._post(self._flush_cache)

    def sleep(self) -> Future[None]:
        """Drop weights and caches; refused unless paused and idle."""
        return self._post(self._sleep)

    def wake(self, tags: Sequence[str]) -> Future[None]:
        """Allocate what the tags name."""
        return self._post(lambda: self._command(messages.Wake(tags=list(tags))))

    def digests(self) -> Future[list[dict[str, str]]]:
        """Digest of every live tensor, by rank and name."""
        return self._post(lambda: [reply.digests for reply in self._pool.call(messages.Digest())])

    def attach(self, rendezvous: Rendezvous) -> Future[list[AttachResult]]:
        """Make all ranks take part in an update. From this call to its end all other control calls are refused.

        Raises:
            EngineStateError: not paused, asleep, or updating already.
        """
        with self._lock:
            state, detail = self._state()
            if state is EndpointState.UPDATING or self._weights_asleep():
                raise EngineStateError(f"the engine is {state.value}: {detail}; it cannot attach now")
            if not self._scheduler.stopped or self._pause_waiters:
                raise EngineStateError(f"the engine is {state.value}, expected paused; pause it first")
            future = self._post(lambda: self._attach(rendezvous))
            self._updating = True
        return future

    # -- passing work over -----------------------------------------------------------------
    def _post(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._dead_cause or self._stopping:
                raise EngineUnavailable(f"the engine is dead: {self._dead_cause or 'it shuts down'}")
            if self._updating:
                raise EngineStateError("the engine is updating; wait for its end")
            self._calls.put((work, future))
        self._wake()
        return future

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            return  # stopped: nobody is to be woken

    def _state(self) -> tuple[EndpointState, str]:
        with self._lock:
            if self._dead_cause:
                return EndpointState.DEAD, self._dead_cause
            if not self.ready.done():
                return EndpointState.STARTING, "ranks load their weights"
            if self._updating:
                return EndpointState.UPDATING, "an update is running"
            if reason := _first_reason(self._replies):
                return reason
            if mode := self._scheduler.pause_mode:
                return EndpointState.PAUSED, f"pause mode {mode.value}"
            return EndpointState.SERVING, ""

    def _device_uuids(self) -> tuple[str, ...]:
        on_cpu = self._device_kind is DeviceKind.CPU
        return () if on_cpu else tuple(reply.device_uuid for reply in self._replies)

    def _weights_asleep(self) -> bool:
        return any("weights" in reply.asleep for reply in self._replies)

    # -- the engine's thread ---------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._replies = self._pool.wait_ready()
            self.ready.set_result(None)
            while not self._stopping:
                self._turn()
            self._die("it shuts down")
        except CkptError as error:
            self._die(str(error))
        except Exception as error:  # noqa: BLE001 (a fault of ours must not leave requests hanging)
            _log.exception("the engine's thread failed")
            self._die(f"{type(error).__name__}: {error}")
        finally:
            self._pool.close()

    def _turn(self) -> None:
        self._carry_out_calls()
        self._free()
        self._settle_pause()
        with self._lock:
            items = self._scheduler.next_items() if self._scheduler.has_work else []
        if items:
            self._step(items)
        else:
            self._wait_idle()

    def _carry_out_calls(self) -> None:
        while not self._calls.empty():
            work, future = self._calls.get()
            try:
                future.set_result(work())
            except EngineStateError as error:
                future.set_exception(error)
            except CkptError as error:
                future.set_exception(EngineUnavailable(str(error)))
                raise  # ranks are gone or out of step: there is no going on

    def _step(self, items: list[messages.StepItem]) -> None:
        asked = [item.sequence_id for item in items]
        try:
            replies = self._pool.call(messages.Step(items=items))
        except EngineStateError as error:  # the ranks' own guard
            with self._lock:
                self._scheduler.end_all(FinishReason.ERROR, str(error))
            return
        with self._lock:
            self._scheduler.take(dict(zip(asked, replies[0].token_ids, strict=True)), self.version)

    def _wait_idle(self) -> None:
        # no deadline: a call, a request, or a rank that ends, each makes something readable
        ready = wait([self._wake_read, *self._pool.pipes])
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        else:
            raise self._pool.explain(ready[0])

    def _free(self) -> None:
        with self._lock:
            freed = self._scheduler.take_freed()
        if freed:
            self._pool.call(messages.Free(sequence_ids=freed))

    def _pause(self, mode: PauseMode, result: Future[int]) -> None:
        with self._lock:
            self._scheduler.pause(mode)
            self._pause_waiters.append(result)

    def _settle_pause(self) -> None:
        with self._lock:
            if not (self._pause_waiters and self._scheduler.stopped):
                return
            waiters, self._pause_waiters = self._pause_waiters, []
            in_flight = len(self._scheduler.running) + len(self._scheduler.waiting)
        self._command(messages.SetPaused(paused=True))
        for waiter in waiters:
            waiter.set_result(in_flight)

    def _resume(self, version: str | None) -> None:
        state, detail = self._state()
        if state in _FIRST_REASONS:
            raise EngineStateError(f"the engine cannot resume, it is {state.value}: {detail}")
        self._command(messages.SetPaused(paused=False))
        with self._lock:
            self._scheduler.resume()
            self.version = version or self.version
            waiters, self._pause_waiters = self._pause_waiters, []
        for waiter in waiters:
            waiter.set_exception(EngineStateError("resumed before the pause was complete"))

    def _flush_cache(self) -> None:
        if holding := len(self._scheduler.running):
            raise EngineStateError(
                f"{holding} requests hold keys and values; pause with mode abort, wait or retract, then flush"
            )
        self._command(messages.FlushCache())

    def _sleep(self) -> None:
        if not self._scheduler.stopped or self._scheduler.running:
            raise EngineStateError("sleep needs a pause with mode abort, wait or retract, and no running request")
        self._command(messages.Sleep())
        self.version = ""

    def _attach(self, rendezvous: Rendezvous) -> list[AttachResult]:
        timeout_s = self._pool.options.attach_timeout_s
        replies = self._pool.call(messages.Attach(rendezvous=rendezvous), timeout_s=timeout_s)
        with self._lock:
            self._replies, self._updating = replies, False
            state, detail = self._state()
            if state is EndpointState.POISONED:
                self._scheduler.end_all(FinishReason.ERROR, f"the engine is poisoned: {detail}")
            elif all(reply.outcome == "committed" for reply in replies):
                self.version = replies[0].version
        return [
            AttachResult(rank=rank, outcome=reply.outcome, error=reply.attach_error)
            for rank, reply in enumerate(replies)
        ]

    def _command(self, command: messages.Command) -> None:
        replies = self._pool.call(command)
        with self._lock:
            self._replies = replies

    def _die(self, cause: str) -> None:
        with self._lock:
            self._dead_cause, self._updating = cause, False
            self._scheduler.end_all(FinishReason.ERROR, f"the engine is dead: {cause}")
            futures, self._pause_waiters = [*self._pause_waiters], []
            while not self._calls.empty():
                futures.append(self._calls.get()[1])
        error = EngineUnavailable(f"the engine is dead: {cause}")
        for future in futures:
            future.set_exception(error)
        if not self.ready.done():
            self.ready.set_exception(error)


def _first_reason(replies: Sequence[Reply]) -> tuple[EndpointState, str] | None:
    """Why the ranks may not serve, worst reason first."""
    for state in _FIRST_REASONS:
        for rank, reply in enumerate(replies):
            if reply.state == state.value:
                return state, f"rank {rank}: {reply.detail}"
    held = [reply.version for reply in replies]
    if len(set(held)) > 1:
        return EndpointState.POISONED, f"the ranks hold different versions: {held}"
    return None


def _pass_error(done: Future[Any], result: Future[Any]) -> None:
    error = done.exception()
    if error is not None and not result.done():
        result.set_exception(error)
