"""Ways to call every rank of an engine from the process that holds it: there is no HTTP route for that.

Target(engine="trtllm", url="any label", handle=llm)                    # LLM(orchestrator_type="ray", ...)
Target(engine="trtllm", url="any label", handle=AsyncHandle(llm, loop))  # AsyncLLM, and the loop that runs it
Target(engine="trtllm", url="any label", handle=LocalHandle(worker))     # one rank, in this process
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from ckpt_core.errors import ConfigError, EngineUnavailable
from ckpt_trtllm.calls import RankCalls

_EXTENSION = "ckpt_trtllm.extension.CkptWorkerExtension"
_HOW_TO_START = f'start it with orchestrator_type="ray" and ray_worker_extension_cls="{_EXTENSION}"'


class Handle(ABC):
    """What the hooks need of an engine."""

    @abstractmethod
    def rpc(self, method: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """Answers of all ranks, in their order.

        Raises:
            EngineUnavailable: it did not answer in time, or its ranks do not have our calls.
        """

    @abstractmethod
    def abort_requests(self, timeout_s: float) -> bool:
        """End all requests in flight; False where the engine cannot."""

    @abstractmethod
    def admit_requests(self, timeout_s: float) -> None:
        """Let clients submit again, where `abort_requests` stopped them."""


class SyncHandle(Handle):
    """An `LLM` with Ray workers."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._call = getattr(llm, "_collective_rpc", None) or getattr(llm, "collective_rpc", None)

    def rpc(self, method: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """By TensorRT-LLM's collective RPC, which has no deadline of its own."""
        return list(_within(lambda: self._call(method, args), method, timeout_s))  # type: ignore[misc]

    def abort_requests(self, timeout_s: float) -> bool:
        """By the executor."""
        return _abort_all(getattr(self._llm, "_executor", None))

    def admit_requests(self, timeout_s: float) -> None:
        """Nobody was stopped."""


class AsyncHandle(Handle):
    """An `AsyncLLM`, and the loop that runs it (in another thread than the update's)."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._llm, self._loop = llm, loop

    def rpc(self, method: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """By TensorRT-LLM's collective RPC."""
        return list(self._run(self._llm.collective_rpc(method, args=args), method, timeout_s))

    def abort_requests(self, timeout_s: float) -> bool:
        """By `pause_generation`, which also refuses new ones."""
        if not hasattr(self._llm, "pause_generation"):
            return _abort_all(getattr(self._llm, "_executor", None))
        self._run(self._llm.pause_generation(), "pause_generation", timeout_s)
        return True

    def admit_requests(self, timeout_s: float) -> None:
        """By `resume_generation`."""
        if hasattr(self._llm, "resume_generation"):
            self._run(self._llm.resume_generation(), "resume_generation", timeout_s)

    def _run(self, call: Coroutine[Any, Any, Any], what: str, timeout_s: float) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result(timeout_s)
        except FutureTimeout:
            raise EngineUnavailable(
                f"{what}: TensorRT-LLM did not answer within {timeout_s:g} s; does its loop run?"
            ) from None
        except AttributeError as error:
            raise _without_calls(what, error) from error


class LocalHandle(Handle):
    """One rank that is in this process: a worker, or a single-process executor. No Ray, and no extension, is needed."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def rpc(self, method: str, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """In the caller's thread."""
        return [getattr(RankCalls, method)(self._worker, *args)]

    def abort_requests(self, timeout_s: float) -> bool:
        """By the worker, or its engine."""
        return _abort_all(self._worker) or _abort_all(getattr(self._worker, "engine", None))

    def admit_requests(self, timeout_s: float) -> None:
        """Nobody was stopped."""


def handle_of(given: Any) -> Handle:
    """The handle for what a user gave as one.

    Raises:
        ConfigError: it is nothing that can be called.
    """
    if isinstance(given, Handle):
        return given
    if inspect.iscoroutinefunction(getattr(given, "collective_rpc", None)):
        raise ConfigError(
            "an AsyncLLM belongs to an event loop: give ckpt_trtllm.handles.AsyncHandle(llm, loop) instead"
        )
    executor = getattr(given, "_executor", None)
    if getattr(getattr(executor, "engine", None), "model_engine", None) is not None:
        return LocalHandle(executor)
    if hasattr(given, "_collective_rpc") or hasattr(given, "collective_rpc"):
        return SyncHandle(given)
    raise ConfigError(
        f"expected a tensorrt_llm.LLM, or a handle of ckpt_trtllm.handles, got {type(given).__name__}: the engine is reached "
        "by its own object, for it has no HTTP route to its workers"
    )


def _abort_all(executor: Any) -> bool:
    if not callable(abort := getattr(executor, "abort_all_requests", None)):
        return False
    abort()
    return True


def _within(call: Callable[[], Any], what: str, timeout_s: float) -> Any:
    threads = ThreadPoolExecutor(1, thread_name_prefix="ckpt-trtllm-rpc")
    try:
        return threads.submit(call).result(timeout_s)
    except FutureTimeout:
        raise EngineUnavailable(
            f"{what}: TensorRT-LLM did not answer within {timeout_s:g} s; an update may be running"
        ) from None
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise _without_calls(what, error) from error
    finally:
        threads.shutdown(wait=False)


def _without_calls(what: str, error: Exception) -> EngineUnavailable:
    return EngineUnavailable(f"{what}: the engine's ranks cannot be called ({error}); {_HOW_TO_START}")
