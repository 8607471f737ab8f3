"""SGLang in the conformance suite."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ckpt_conformance.harness import Harness, Server
from ckpt_conformance.levels import ModelKind
from ckpt_conformance.models.tiny import make_tiny
from ckpt_core.api import Target
from ckpt_core.contract import PauseMode
from ckpt_sglang import answers, compat

if TYPE_CHECKING:
    import torch

    from ckpt_sglang.rank import SglangRank
    from ckpt_sglang.slots import Slot

_MODELS: dict[ModelKind, dict[str, Any]] = {
    ModelKind.PLAIN: {"arch": "llama"},
    ModelKind.TIED: {"arch": "qwen3", "tied": True},
    ModelKind.EXPERTS: {"arch": "qwen3_moe", "experts": 4, "layers": 1},
    ModelKind.ODD_SIZES: {
        "arch": "qwen3",
        "vocab": 61,
        "hidden": 27,
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 6,
        "intermediate": 35,
        "dtype": "float32",
    },
}
_CONTEXT = 2700
_LONG_ANSWER = 1000  # tokens: some seconds on a CPU
_NOT_WEIGHTS = ("cos_sin_cache",)  # made of the configuration, once


class SglangHarness(Harness):
    """Schedulers in this process, kept per kind of model and used again; servers as processes of their own."""

    engine = "sglang"
    plugin_module = "ckpt_sglang.plugin"
    engine_modules = ("torch", "sglang")
    kinds = frozenset(_MODELS)
    streams = True

    def __init__(self) -> None:
        self._free: dict[ModelKind, list[Slot]] = {}
        self._slots: dict[SglangRank, tuple[ModelKind, Slot]] = {}
        self._bare: dict[Path, Path] = {}

    def checkpoint(self, directory: Path, kind: ModelKind, seed: int) -> Path:
        """Random weights; one or two layers of some ten tensors."""
        return make_tiny(directory, seed=seed, **_MODELS[kind])

    def make_worker(self, checkpoint: Path, kind: ModelKind) -> SglangRank:
        """Dummy weights, from a directory that has none."""
        return self._paused(self._start(self._without_weights(checkpoint), kind, "dummy"))

    def fresh(self, checkpoint: Path, kind: ModelKind) -> SglangRank:
        """Loaded at start."""
        return self._start(checkpoint, kind, "auto")

    def live(self, worker: SglangRank) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the model."""
        model = worker.scheduler.tp_worker.model_runner.model
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tensor.data for name, tensor in named.items() if not name.endswith(_NOT_WEIGHTS)}

    def close(self, worker: SglangRank) -> None:
        """Its scheduler can be used again."""
        kind, slot = self._slots.pop(worker)
        self._free.setdefault(kind, []).append(slot)

    def generate(self, worker: SglangRank, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """By SGLang's event loop."""
        return self._slot(worker).generate(prompt_token_ids, max_tokens)

    def serve(self, worker: SglangRank) -> None:
        """Resume."""
        from ckpt_sglang.slots import SlotHandle

        SlotHandle(self._slot(worker)).resume(None)

    def waiting_worker(self, checkpoint: Path, kind: ModelKind) -> SglangRank:
        """As with --checkpoint-engine-wait-weights-before-ready."""
        return self._paused(self._start(self._without_weights(checkpoint), kind, "dummy", waiting=True))

    @contextmanager
    def failing_finish(self, worker: SglangRank, error: Exception) -> Iterator[None]:
        """The first linear layer's own post-processing raises."""
        model = worker.scheduler.tp_worker.model_runner.model
        method = next(m.quant_method for m in model.modules() if getattr(m, "quant_method", None) is not None)
        with patch.object(type(method), "process_weights_after_loading", side_effect=error):
            yield

    def target(self, worker: SglangRank) -> Target:
        """The worker as an engine by itself."""
        from ckpt_sglang.slots import SlotHandle

        handle = SlotHandle(self._slot(worker))
        return Target(engine=self.engine, url=f"in-process-{worker.instance_id}", handle=handle)

    @contextmanager
    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> Iterator[Server]:
        """A real server."""
        from ckpt_sglang.launch import SglangServer

        options = (f"--context-length={_CONTEXT}", f"--max-total-tokens={2 * _CONTEXT}")
        with SglangServer(checkpoint, tp=ranks, load_format="dummy" if dummy else "auto", extra=options) as server:
            yield Server(
                target=Target(engine=self.engine, url=server.url),
                generate=server.generate,
                digests=server.live_digests,
                stream=partial(answers.stream, server.client),
                most_tokens=_LONG_ANSWER,
            )

    def _slot(self, worker: SglangRank) -> Slot:
        return self._slots[worker][1]

    def _start(self, checkpoint: Path, kind: ModelKind, load_format: str, *, waiting: bool = False) -> SglangRank:
        compat.load_plugins()
        free = self._free.setdefault(kind, [])
        if not free:
            from ckpt_sglang.slots import Slot

            free.append(Slot(checkpoint, dtype=str(_MODELS[kind].get("dtype", "bfloat16"))))
        slot = free.pop()
        worker = slot.renew(checkpoint, load_format, waiting=waiting)
        self._slots[worker] = (kind, slot)
        return worker

    def _paused(self, worker: SglangRank) -> SglangRank:
        from ckpt_sglang.slots import SlotHandle

        SlotHandle(self._slot(worker)).pause(PauseMode.ABORT)
        return worker

    def _without_weights(self, checkpoint: Path) -> Path:
        """The checkpoint's directory without its tensors."""
        if checkpoint not in self._bare:
            directory = Path(tempfile.mkdtemp(prefix="ckpt-sglang-"))
            weakref.finalize(self, shutil.rmtree, directory, True)
            for file in checkpoint.glob("*.json"):
                shutil.copyfile(file, directory / file.name)
            self._bare[checkpoint] = directory
        return self._bare[checkpoint]


harness = SglangHarness()
