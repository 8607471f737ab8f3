"""The reference engine in the suite: what an engine author writes, for an engine that can do everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ckpt_conformance.harness import Harness, Server
from ckpt_conformance.levels import ModelKind
from ckpt_conformance.models.kinds import TINY_KINDS
from ckpt_conformance.models.tiny import make_tiny
from ckpt_conformance.reference import plugin as reference_plugin
from ckpt_conformance.reference.options import WorkerOptions
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_conformance.reference.worker import Worker
from ckpt_conformance.streams import Span, Told
from ckpt_core.api import Target
from ckpt_core.contract import AttachResult, Rendezvous
from ckpt_core.plugins import EnginePlugin


class ReferenceHarness(Harness):
    """The reference engine, or a variant of it.

    Args:
        worker_type: the class of its workers.
        implementation: the module or object with its hooks.
        server_prefix: command that runs its server, before the usual one.
        rank_plugin: module with the hooks that the server's ranks use; "" for the usual one.
    """

    engine = reference_plugin.ENGINE
    plugin_module = reference_plugin.__name__
    engine_modules = ("torch", "ckpt_conformance.reference.worker")
    kinds = frozenset(ModelKind)
    streams = True

    def __init__(
        self,
        worker_type: type[Worker] = Worker,
        implementation: Any = reference_plugin,
        *,
        server_prefix: Sequence[str] = (),
        rank_plugin: str = "",
    ) -> None:
        self.worker_type = worker_type
        self.implementation = implementation
        self._server_prefix = server_prefix
        self._server_extra = (f"--plugin={rank_plugin}",) if rank_plugin else ()

    def plugin(self) -> EnginePlugin:
        """The plugin, or the variant."""
        return EnginePlugin(self.implementation, name=self.engine)

    def checkpoint(self, directory: Path, kind: ModelKind, seed: int) -> Path:
        """Random weights; one or two layers of some ten tensors."""
        return make_tiny(directory, seed=seed, **TINY_KINDS[kind])

    def make_worker(self, checkpoint: Path, kind: ModelKind) -> Worker:
        """Random weights of another seed."""
        worker = self._start(checkpoint, kind, WorkerOptions(load_format="dummy", seed=99, quantise=_quantise(kind)))
        worker.pause()
        return worker

    def fresh(self, checkpoint: Path, kind: ModelKind) -> Worker:
        """Loaded at start."""
        return self._start(checkpoint, kind, WorkerOptions(quantise=_quantise(kind)))

    def live(self, worker: Worker) -> dict[str, torch.Tensor]:
        """From the model's layers, not through the plugin."""
        return worker.model.live_tensors()

    def close(self, worker: Worker) -> None:
        """Free its weights."""
        worker.model.release()

    def generate(self, worker: Worker, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy, with the prefix cache."""
        return worker.generate(prompt_token_ids, max_tokens)

    def serve(self, worker: Worker) -> None:
        """Resume."""
        worker.resume()

    def sleep(self, worker: Worker) -> None:
        """Drop the weights."""
        worker.sleep()

    def waiting_worker(self, checkpoint: Path, kind: ModelKind) -> Worker:
        """Dummy weights that must never serve."""
        options = WorkerOptions(load_format="dummy", quantise=_quantise(kind), wait_for_weights=True)
        worker = self._start(checkpoint, kind, options)
        worker.pause()
        return worker

    @contextmanager
    def failing_finish(self, worker: Worker, error: Exception) -> Iterator[None]:
        """The model's own post-processing raises."""
        with patch.object(worker.model, "process_weights_after_loading", side_effect=error):
            yield

    def target(self, worker: Worker) -> Target:
        """The worker as an engine by itself."""
        handle = _Handle(worker, self.plugin())
        return Target(engine=self.engine, url=f"in-process-{worker.instance_id}", handle=handle)

    @contextmanager
    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> Iterator[Server]:
        """A process per rank, and one that serves."""
        from ckpt_conformance.reference.launch import ReferenceServer

        with ReferenceServer(
            checkpoint,
            tp=ranks,
            load_format="dummy" if dummy else "auto",
            extra=self._server_extra,
            prefix=self._server_prefix,
        ) as server:

            def generate(prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
                return list(server.generate(prompt_token_ids, max_tokens)["token_ids"])

            def stream(prompt_token_ids: Sequence[int], max_tokens: int) -> Iterator[Told]:
                events = server.stream(prompt_token_ids, max_tokens, ignore_eos=True)
                for number, event in enumerate(event for event in events if "token_id" in event):
                    span = Span(version=event["version"], start=number, end=number + 1)
                    yield Told(token_ids=(event["token_id"],), spans=(span,))

            target = Target(engine=self.engine, url=server.url)
            yield Server(target=target, generate=generate, digests=server.live_digests, stream=stream)

    def _start(self, checkpoint: Path, kind: ModelKind, options: WorkerOptions) -> Worker:
        # no process group: weights are laid out as on that rank, and this kind never generates
        group = TpGroup(rank=1, size=2) if kind is ModelKind.SHARDED else None
        return self.worker_type(checkpoint, options, group=group)


class _Handle:
    """A worker whose attach uses the plugin that is checked, and not the installed one."""

    def __init__(self, worker: Worker, plugin: EnginePlugin) -> None:
        self._worker, self._plugin = worker, plugin

    def attach(self, rendezvous: Rendezvous) -> AttachResult:
        """Take part in an update; blocks until it is over."""
        return self._worker.attach(rendezvous, self._plugin)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def _quantise(kind: ModelKind) -> bool:
    return kind is ModelKind.QUANTISED


harness = ReferenceHarness()
