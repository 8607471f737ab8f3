"""TensorRT-LLM in the conformance suite: the engine itself where it is installed, else its stand-in. It says which."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from ckpt_conformance.harness import Harness, NotOffered, Server
from ckpt_conformance.levels import ModelKind
from ckpt_conformance.models.tiny import make_tiny
from ckpt_core.api import Target
from ckpt_core.endpoint import Endpoint
from ckpt_trtllm import compat, control
from ckpt_trtllm.calls import ENGINE

if TYPE_CHECKING:
    import torch

    from ckpt_trtllm.engines import Engines
    from ckpt_trtllm.rank import TrtllmRank

_log = logging.getLogger(__name__)


class TrtllmHarness(Harness):
    """See the module.

    Args:
        stand_in: take it even where TensorRT-LLM is installed.
    """

    engine = ENGINE
    plugin_module = "ckpt_trtllm.plugin"
    engine_modules = ("torch", "tensorrt_llm", "ckpt_trtllm.standin")

    def __init__(self, *, stand_in: bool = False) -> None:
        self._stand_in = stand_in or not compat.is_installed()

    @property
    def kinds(self) -> frozenset[ModelKind]:  # type: ignore[override]
        """What the engine at hand was given models for."""
        return frozenset(self.engines.models)

    @cached_property
    def engines(self) -> Engines:
        """The engine at hand."""
        found: Engines
        if self._stand_in:
            from ckpt_trtllm.standin.engines import StandInEngines

            found = StandInEngines()
        else:
            from ckpt_trtllm.real import RealEngines

            found = RealEngines()
        _log.warning("conformance of trtllm runs on %s", found.name)
        return found

    def checkpoint(self, directory: Path, kind: ModelKind, seed: int) -> Path:
        """Random weights; one or two layers of some ten tensors."""
        return make_tiny(directory, seed=seed, **self.engines.models[kind])

    def make_worker(self, checkpoint: Path, kind: ModelKind) -> TrtllmRank:
        """Dummy weights; the files are there, for their headers."""
        return self._parked(self.engines.start(checkpoint, kind, load_format="dummy"))

    def fresh(self, checkpoint: Path, kind: ModelKind) -> TrtllmRank:
        """Loaded at start."""
        return self.engines.start(checkpoint, kind, load_format="auto")

    def live(self, worker: TrtllmRank) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of the engine's model, each once."""
        model = compat.model_of(worker.worker)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tensor.data for name, tensor in named.items() if tensor.numel()}

    def close(self, worker: TrtllmRank) -> None:
        """As the engine at hand does it."""
        self.engines.close(worker)

    def generate(self, worker: TrtllmRank, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """By the engine's executor."""
        return self.engines.generate(worker, prompt_token_ids, max_tokens)

    def serve(self, worker: TrtllmRank) -> None:
        """Resume, as a client would."""
        target = self.target(worker)
        control.resume(Endpoint(url=target.url, engine=target.engine, handle=target.handle), None)

    def waiting_worker(self, checkpoint: Path, kind: ModelKind) -> TrtllmRank:
        """As WaitingWorkerExtension makes it."""
        return self._parked(self.engines.start(checkpoint, kind, load_format="dummy", waiting=True))

    @contextmanager
    def failing_finish(self, worker: TrtllmRank, error: Exception) -> Iterator[None]:
        """The post-processing of the first module that has some raises."""
        for module in compat.model_of(worker.worker).modules():
            for name in ("process_weights_after_loading", "post_load_weights"):
                if callable(getattr(module, name, None)):
                    with patch.object(module, name, side_effect=error):
                        yield
                    return
        raise NotOffered("failing_finish(): no module of the model processes anything")

    def target(self, worker: TrtllmRank) -> Target:
        """The rank as an engine by itself."""
        return Target(
            engine=ENGINE, url=f"in-process-{worker.identity.instance_id}", handle=self.engines.handle(worker)
        )

    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> AbstractContextManager[Server]:
        """Several ranks, called together."""
        return self.engines.server(checkpoint, ranks=ranks, dummy=dummy)

    def _parked(self, worker: TrtllmRank) -> TrtllmRank:
        worker.hold.take()
        return worker


harness = TrtllmHarness()
stand_in_harness = TrtllmHarness(stand_in=True)
