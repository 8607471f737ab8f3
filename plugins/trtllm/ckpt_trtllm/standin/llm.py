"""The engine as its user holds it: ranks that are called together, each in a thread of its own as a Ray actor would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt_conformance.reference.parallel import TpGroup
from ckpt_trtllm.standin.group import Board, ThreadGroup
from ckpt_trtllm.standin.worker import StandInWorker, with_extension

EXTENSION = "ckpt_trtllm.extension.CkptWorkerExtension"


class StandInLlm:
    """A context manager: ends its threads.

    Args:
        directory: checkpoint, Hugging Face layout.
        tensor_parallel_size: ranks.
        load_format: "auto" or "dummy".
        ray_worker_extension_cls: mixed into every worker.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tensor_parallel_size: int = 1,
        load_format: str = "auto",
        ray_worker_extension_cls: str = EXTENSION,
    ) -> None:
        size = tensor_parallel_size
        board = Board(size)
        groups = [ThreadGroup(rank=rank, size=size, board=board) if size > 1 else TpGroup() for rank in range(size)]
        worker_class = with_extension(StandInWorker, ray_worker_extension_cls)
        self.workers = [worker_class(directory, group=group, load_format=load_format) for group in groups]
        self._actors = [ThreadPoolExecutor(1, thread_name_prefix=f"rank-{rank}") for rank in range(size)]
        self._collective_rpc("setup_engine")

    def __enter__(self) -> StandInLlm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        for actor in self._actors:
            actor.shutdown(wait=True)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy new token ids."""
        tokens: list[int] = self._collective_rpc("generate", (list(prompt_token_ids), max_tokens))[0]
        return tokens

    def _collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Answers of all ranks; the first error is raised.

        Raises:
            AttributeError: the workers have no such method.
        """
        methods: list[Callable[..., Any]] = [getattr(worker, method) for worker in self.workers]
        calls = [
            actor.submit(function, *args, **(kwargs or {}))
            for actor, function in zip(self._actors, methods, strict=True)
        ]
        return [call.result() for call in calls]
