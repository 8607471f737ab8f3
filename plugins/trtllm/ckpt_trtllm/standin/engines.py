"""The stand-in in the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ckpt_conformance.harness import Server
from ckpt_conformance.levels import ModelKind
from ckpt_conformance.models.kinds import TINY_KINDS
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_core.api import Target
from ckpt_trtllm.calls import ENGINE
from ckpt_trtllm.engines import Engines
from ckpt_trtllm.handles import Handle, LocalHandle
from ckpt_trtllm.rank import TrtllmRank, rank_of
from ckpt_trtllm.standin.llm import EXTENSION, StandInLlm
from ckpt_trtllm.standin.worker import StandInWorker, with_extension

_WAITING_EXTENSION = "ckpt_trtllm.extension.WaitingWorkerExtension"


class StandInEngines(Engines):
    """One worker each, made anew: they are small."""

    name = "the stand-in (TensorRT-LLM is not installed)"
    models: ClassVar[dict[ModelKind, dict[str, Any]]] = TINY_KINDS

    def start(self, checkpoint: Path, kind: ModelKind, *, load_format: str, waiting: bool = False) -> TrtllmRank:
        """A worker with the extension mixed in, its engine set up."""
        worker_class = with_extension(StandInWorker, _WAITING_EXTENSION if waiting else EXTENSION)
        # the second of two ranks without the first: weights are laid out as there, and this kind never generates
        group = TpGroup(rank=1, size=2) if kind is ModelKind.SHARDED else None
        quantise = kind is ModelKind.QUANTISED
        worker = worker_class(checkpoint, group=group, load_format=load_format, quantise=quantise)
        worker.setup_engine()
        rank = rank_of(worker)
        rank.identity.tell(f"stand-in-{id(worker):x}")
        return rank

    def generate(self, rank: TrtllmRank, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """By its executor."""
        tokens: list[int] = rank.worker.generate(prompt_token_ids, max_tokens)
        return tokens

    def handle(self, rank: TrtllmRank) -> Handle:
        """The worker itself."""
        return LocalHandle(rank.worker)

    def close(self, rank: TrtllmRank) -> None:
        """Free its weights."""
        rank.worker.engine.model_engine.model.release()

    @contextmanager
    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> Iterator[Server]:
        """Ranks in threads, called together; no HTTP, as with TensorRT-LLM."""
        with StandInLlm(checkpoint, tensor_parallel_size=ranks, load_format="dummy" if dummy else "auto") as llm:

            def digests() -> list[Mapping[str, str]]:
                return [answer["digests"] for answer in llm._collective_rpc("ckpt_digests")]

            target = Target(engine=ENGINE, url=f"stand-in-{id(llm):x}", handle=llm)
            yield Server(target=target, generate=llm.generate, digests=digests)
