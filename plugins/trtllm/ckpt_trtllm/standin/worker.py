"""The worker of one rank, with an extension mixed in by its name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ckpt_conformance.reference.parallel import TpGroup
from ckpt_core.errors import EngineStateError
from ckpt_trtllm.standin.executor import Executor, ModelEngine
from ckpt_trtllm.standin.loader import ModelLoader


class StandInWorker:
    """What an extension finds: `engine` (once it is set up), `device_id`, `global_rank`."""

    engine: Executor

    def __init__(
        self,
        directory: Path,
        *,
        group: TpGroup | None = None,
        load_format: str = "auto",
        quantise: bool = False,
        device: str = "cpu",
    ) -> None:
        self._group = group or TpGroup()
        self._load_format = load_format
        self._loader = ModelLoader(directory, self._group, quantise=quantise, device=device)
        self.hf_model_dir = directory
        self.device_id = 0
        self.global_rank = self._group.rank

    def setup_engine(self) -> None:
        """Load the model."""
        self.engine = Executor(ModelEngine(self._loader, self._load_format), self._group)

    def abort_update_weights(self, reason: str = "") -> None:
        """A native update is forgotten; there is none here."""
        vars(self.engine.model_engine.model).pop("first_pre_reload_weights", None)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy new token ids.

        Raises:
            EngineStateError: the executor takes no step, or the request failed.
        """
        request = self.engine.enqueue_request(list(prompt_token_ids), max_tokens)
        while not request.done:
            if not self.engine.run_once():
                self.engine.cancel_request(request)
                raise EngineStateError(f"rank {self.global_rank}: the executor is parked and takes no step")
        if request.error:
            raise EngineStateError(f"rank {self.global_rank}: the request failed: {request.error}")
        return list(request.new)


def with_extension(worker_class: type[Any], extension: str) -> type[Any]:
    """A class with an extension's methods too, as TensorRT-LLM makes it.

    Raises:
        ValueError: the worker has a method of that name.
    """
    module, _, name = extension.rpartition(".")
    extension_class = getattr(import_module(module), name)
    for attribute in dir(extension_class):
        if not attribute.startswith("__") and hasattr(worker_class, attribute):
            raise ValueError(f"{worker_class.__name__} already defines {attribute!r}, and {extension} does, too")
    derived = f"{worker_class.__name__}With{extension_class.__name__}"
    return type(derived, (worker_class, extension_class), {"__module__": worker_class.__module__})
