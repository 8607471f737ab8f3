"""Real TensorRT-LLM in the conformance suite. NEVER RUN: written from its sources, for somebody with a GPU.

Engines run in this process (`TLLM_WORKER_USE_SINGLE_PROCESS=1`), so that hooks can be called on their worker; they are kept and
handed out again, since a start takes long. The check of several ranks starts Ray workers, and is skipped without the GPUs for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ckpt_conformance.harness import NotOffered, Server
from ckpt_conformance.levels import ModelKind
from ckpt_core.api import Target
from ckpt_core.errors import EngineStateError
from ckpt_trtllm.calls import ENGINE
from ckpt_trtllm.engines import Engines
from ckpt_trtllm.handles import Handle, handle_of
from ckpt_trtllm.rank import TrtllmRank, rank_of

_SIZES: dict[str, Any] = {
    "vocab": 512,
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "intermediate": 512,
    "experts": 4,
    "moe_intermediate": 128,
}
_EXTENSION = "ckpt_trtllm.extension.CkptWorkerExtension"
_TOKEN_TIMEOUT_S = 30.0
_GARBAGE = 0x55


class RealEngines(Engines):
    """See the module."""

    name = "TensorRT-LLM"
    models: ClassVar[dict[ModelKind, dict[str, Any]]] = {
        ModelKind.PLAIN: {"arch": "llama", **_SIZES},
        ModelKind.TIED: {"arch": "qwen3", "tied": True, **_SIZES},
        ModelKind.EXPERTS: {"arch": "qwen3_moe", **_SIZES, "layers": 1},
    }

    def __init__(self) -> None:
        self._idle: dict[ModelKind, list[TrtllmRank]] = {}
        self._known: dict[int, tuple[ModelKind, str, Any]] = {}  # by id of the rank, which its worker keeps alive

    def start(self, checkpoint: Path, kind: ModelKind, *, load_format: str, waiting: bool = False) -> TrtllmRank:
        """One that is idle, where dummy weights are wanted and no waiting; else a new one."""
        idle = self._idle.setdefault(kind, [])
        if idle and load_format == "dummy" and not waiting:
            return self._renewed(idle.pop())
        os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"
        llm = _start_llm(checkpoint, load_format=load_format)
        rank = rank_of(llm._executor)
        rank.guard.waiting = waiting
        self._known[id(rank)] = (kind, load_format, llm)
        return rank

    def generate(self, rank: TrtllmRank, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy. A parked executor gives no error: the request waits, and is given up."""
        from tensorrt_llm import SamplingParams

        rank.guard.check()
        if rank.hold.taken:
            raise EngineStateError("the executor is parked and takes no step")
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, end_id=-1)
        _, _, llm = self._known[id(rank)]
        output = llm.generate_async(list(prompt_token_ids), sampling_params=params).result(_TOKEN_TIMEOUT_S)
        return [int(token) for token in output.outputs[0].token_ids]

    def handle(self, rank: TrtllmRank) -> Handle:
        """Of its LLM."""
        return handle_of(self._known[id(rank)][2])

    def close(self, rank: TrtllmRank) -> None:
        """Idle again, or ended where it was started on real weights."""
        kind, load_format, llm = self._known[id(rank)]
        if load_format == "dummy":
            self._idle.setdefault(kind, []).append(rank)
            return
        del self._known[id(rank)]
        rank.hold.leave()
        llm.shutdown()

    @contextmanager
    def server(self, checkpoint: Path, *, ranks: int, dummy: bool) -> Iterator[Server]:
        """Ray workers with the extension."""
        import torch

        if find_spec("ray") is None or torch.cuda.device_count() < ranks:
            raise NotOffered(f"server(): needs ray, and {ranks} GPUs")
        llm = _start_llm(
            checkpoint,
            load_format="dummy" if dummy else "auto",
            orchestrator_type="ray",
            ray_worker_extension_cls=_EXTENSION,
            tensor_parallel_size=ranks,
        )

        def generate(prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
            from tensorrt_llm import SamplingParams

            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, end_id=-1)
            output = llm.generate_async(list(prompt_token_ids), sampling_params=params).result(_TOKEN_TIMEOUT_S)
            return [int(token) for token in output.outputs[0].token_ids]

        def digests() -> list[Mapping[str, str]]:
            handle = handle_of(llm)
            return [answer["digests"] for answer in handle.rpc("ckpt_digests", (), _TOKEN_TIMEOUT_S)]

        try:
            target = Target(engine=ENGINE, url=f"ray-{id(llm):x}", handle=llm)
            yield Server(target=target, generate=generate, digests=digests)
        finally:
            llm.shutdown()

    def _renewed(self, rank: TrtllmRank) -> TrtllmRank:
        """No value, and no state, of the last user survives."""
        rank.forget()
        rank.hold.leave()
        for item in rank.live().values():
            storage: Any = item.tensor.untyped_storage()
            storage.fill_(_GARBAGE)
        return rank


def _start_llm(checkpoint: Path, *, load_format: str, **options: Any) -> Any:
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import KvCacheConfig

    return LLM(
        model=str(checkpoint),
        load_format=load_format,
        skip_tokenizer_init=True,
        max_seq_len=128,
        max_batch_size=4,
        max_num_tokens=256,
        kv_cache_config=KvCacheConfig(max_tokens=2048, enable_block_reuse=True),
        **options,
    )
