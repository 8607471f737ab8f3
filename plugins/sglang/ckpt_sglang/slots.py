"""A real SGLang scheduler in this process, stepped by hand: what the conformance suite takes for a worker.

SGLang runs one scheduler a process. Here several of one kind of model live side by side on the same groups of one rank; the suite
uses one kind at a time. Models are built anew by SGLang's own loader for every worker, schedulers are kept and used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from array import array
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ckpt_core.contract import EndpointStatus, PauseMode, Rendezvous
from ckpt_core.errors import EngineStateError
from ckpt_sglang import attachment, compat
from ckpt_sglang.client import ClientHandle
from ckpt_sglang.control import EngineControl
from ckpt_sglang.front import around_continue, around_update
from ckpt_sglang.rank import SglangRank

_TIMEOUT_S = 60.0
_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 2048,
    "context_length": 128,
    "max_running_requests": 4,
    "mem_fraction_static": 0.1,
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "log_level": "error",
}


class Slot:
    """One scheduler, used by one worker after the other.

    Attributes:
        scheduler: SGLang's.
        manager: stands in for the tokenizer manager in front of it.
    """

    def __init__(self, model_path: Path, dtype: str) -> None:
        import zmq
        from sglang.srt import runtime_context
        from sglang.srt.managers import scheduler
        from sglang.srt.server_args import PortArgs, ServerArgs

        arguments = ServerArgs(model_path=str(model_path), dtype=dtype, **_OPTIONS)
        arguments.resolve_once()
        arguments.check_server_args()
        ports = PortArgs.init_new(arguments)
        ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
        runtime_context.publish(arguments, role="scheduler", ranks=ranks)
        runtime_context.get_resources().expert_location_metadata = None
        context = zmq.Context.instance()
        self._requests = context.socket(zmq.PUSH)
        self._requests.bind(ports.scheduler_input_ipc_name)
        self._answers = context.socket(zmq.PULL)
        self._answers.bind(ports.tokenizer_ipc_name)
        with _groups_kept():
            self.scheduler = scheduler.Scheduler(arguments, ports)
        self._published = runtime_context.snapshot_context()
        self.manager = FrontDouble(self)

    def renew(self, checkpoint: Path, load_format: str, *, waiting: bool) -> SglangRank:
        """Another start of the engine: a new model, by SGLang's loader, and a new adapter."""
        from sglang.srt import runtime_context

        runtime_context.restore_context(self._published)
        attachment.forget(self.scheduler)
        runner = self.scheduler.tp_worker.model_runner
        runner.draft_load_format = load_format
        runner.model_config.model_path = str(checkpoint)
        runner.load_model()
        compat.set_paused(self.scheduler, paused=False)
        with patch.object(compat, "waits_for_weights", return_value=waiting):
            attachment.after_scheduler_init(None, self.scheduler)
        if not self.scheduler.flush_cache():
            raise EngineStateError("the scheduler that is to be used again still has requests")
        self.manager = FrontDouble(self)
        return attachment.rank_of(self.scheduler)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens, by SGLang's event loop.

        Raises:
            EngineStateError: paused, or refused.
        """
        from sglang.srt.managers.io_struct import sock_send

        if self.manager.is_pause:
            raise EngineStateError("paused: the tokenizer manager holds requests back")
        request = _request(prompt_token_ids, max_tokens)
        sock_send(self._requests, request)
        answer = self._run_until(request.rid)
        if answer is None:
            self._abort(request)
            raise EngineStateError("paused: the scheduler takes no step")
        if not hasattr(answer, "output_ids"):
            raise EngineStateError(str(answer.abort_message))
        return [int(token) for token in answer.output_ids[0]][:max_tokens]

    def _run_until(self, rid: str) -> Any:
        """The last answer to a request; None where the scheduler is paused."""
        found: list[Any] = []
        scheduler, deadline = self.scheduler, time.monotonic() + _TIMEOUT_S
        whole = type(scheduler).ingest_requests

        def ingest_requests(stop_at_pause: bool = False) -> Any:
            taken = whole(scheduler, stop_at_pause)
            found.extend(answer for answer in self._received() if _ends(answer, rid))
            stuck = compat.is_paused(scheduler) and bool(scheduler.waiting_queue)
            scheduler.gracefully_exit = bool(found) or stuck or time.monotonic() > deadline
            return taken

        scheduler.ingest_requests = ingest_requests
        try:
            scheduler.event_loop_normal()
        finally:
            del scheduler.ingest_requests
            scheduler.gracefully_exit = False
        return found[0] if found else None

    def _abort(self, request: Any) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.abort_request(AbortReq(rid=request.rid))
        self._received()

    def _received(self) -> list[Any]:
        import zmq
        from sglang.srt.managers.io_struct import sock_recv

        answers = []
        with contextlib.suppress(zmq.Again):
            while True:
                answers.append(sock_recv(self._answers, zmq.NOBLOCK))
        return answers


class FrontDouble:
    """Stands in for SGLang's tokenizer manager: what `EngineControl` uses of it, on a scheduler in this process."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.rid_to_state: dict[str, Any] = {}
        self.is_pause = False
        self.is_pause_cond = asyncio.Condition()
        self.model_update_lock = self
        self.initial_weights_loaded = False
        self.server_status = None

    async def is_locked(self) -> bool:
        """No request lives longer than a call of `generate`."""
        return False

    async def get_internal_state(self) -> list[dict[str, Any]]:
        """Of the scheduler."""
        from sglang.srt.managers.io_struct import GetInternalStateReq

        return [self._slot.scheduler.get_internal_state(GetInternalStateReq()).internal_state]

    async def pause_generation(self, request: Any) -> None:
        """As SGLang's."""
        self.is_pause = True
        if request.mode != "abort":
            self._slot.scheduler.pause_generation(request)

    async def continue_generation(self, request: Any) -> None:
        """As SGLang's, with our refusal around it; through the gate, like every request."""
        await around_continue(FrontDouble._continue, self, request)

    async def _continue(self, request: Any) -> None:
        self.is_pause = False
        self._slot.scheduler.process_input_requests(attachment.rank_of(self._slot.scheduler).gate.passed([request]))

    async def update_weight_version(self, request: Any) -> None:
        """As SGLang's."""
        self._slot.scheduler.handle_update_weight_version(request)

    def _update_weight_version_if_provided(self, _version: str) -> None:
        """Nothing here answers requests with a version of its own."""

    async def update_weights_from_ipc(self, request: Any, _http: Any) -> tuple[bool, str]:
        """As SGLang's, with our hook around it."""
        result: tuple[bool, str] = await around_update(FrontDouble._update, self, request)
        return result

    async def _update(self, request: Any) -> tuple[bool, str]:
        answer = self._slot.scheduler.weight_updater.update_weights_from_ipc(request)
        return answer.success, answer.message

    async def flush_cache(self) -> Any:
        """As SGLang's."""
        from sglang.srt.managers.io_struct import FlushCacheReqOutput

        return FlushCacheReqOutput(success=self._slot.scheduler.flush_cache(), message="")

    async def resume_memory_occupation(self, request: Any, _http: Any) -> None:
        """As SGLang's."""
        self._slot.scheduler.weight_updater.resume_memory_occupation(request)


class SlotHandle(ClientHandle):
    """A worker of the suite as an engine by itself."""

    def __init__(self, slot: Slot, timeout_s: float = _TIMEOUT_S) -> None:
        self._control = _control_of(slot.manager)
        self._timeout_s = timeout_s

    def status(self) -> EndpointStatus:
        """Of the engine."""
        status: EndpointStatus = self._run(self._control.status())
        return status

    def pause(self, mode: PauseMode) -> int:
        """No new request gets in."""
        return int(self._run(self._control.pause(mode, self._timeout_s)))

    def attach(self, rendezvous: Rendezvous) -> None:
        """Blocks until the rank is out."""
        self._run(self._control.attach(rendezvous))

    def flush(self) -> None:
        """Drop the caches."""
        self._run(self._control.flush())

    def resume(self, version: str | None) -> None:
        """Serve again."""
        self._run(self._control.resume(version))

    def wake(self, tags: tuple[str, ...]) -> None:
        """Take released memory back."""
        self._run(self._control.wake(tags))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(work)


def _control_of(manager: FrontDouble) -> EngineControl:
    from ckpt_sglang.control import control_of

    return control_of(manager)


@contextlib.contextmanager
def _groups_kept() -> Iterator[None]:
    """The second scheduler of a process takes the groups of the first."""
    from sglang.srt.distributed import bootstrap

    once = bootstrap.init_parallel_runtime

    def unless_done(**options: Any) -> None:
        if not bootstrap._PARALLEL_INITIALISED:
            once(**options)

    with patch.object(bootstrap, "init_parallel_runtime", unless_done):
        yield


def _ends(answer: Any, rid: str) -> bool:
    """Whether an answer is the last one to a request."""
    if getattr(answer, "rids", None) is None:
        return bool(getattr(answer, "rid", None) == rid)
    return bool(answer.rids == [rid] and answer.finished_reasons[0] is not None)


def _request(prompt_token_ids: Sequence[int], max_tokens: int) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    sampling.normalize(None)
    return TokenizedGenerateReqInput(
        rid=uuid.uuid4().hex,
        input_text="",
        input_ids=array("q", prompt_token_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
