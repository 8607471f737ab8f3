"""The executor of one rank: its requests, its loop, its control actions. `worker.engine`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

from ckpt_conformance.reference.kv_cache import KvCache, SequenceCache
from ckpt_conformance.reference.parallel import TpGroup
from ckpt_trtllm.standin.loader import ModelLoader
from ckpt_trtllm.standin.model import next_token

_PREFIX_BLOCKS = 64


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt that is continued."""

    token_ids: list[int]
    max_tokens: int
    new: list[int] = field(default_factory=list)
    sequence: SequenceCache | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return bool(self.error) or len(self.new) >= self.max_tokens


class ModelEngine:
    """The model, and what computes with it."""

    def __init__(self, loader: ModelLoader, load_format: str) -> None:
        self.model_loader = loader
        self.model, self.moe_load_balancer = loader.load(load_format)
        self.kv = KvCache(self.model.cache_shape(), prefix_blocks=_PREFIX_BLOCKS)

    def forward(self, request: Request) -> int:
        """One token of a request.

        Raises:
            RuntimeError: something that is derived from weights is that of earlier ones.
        """
        if any(layer.stale for layer in self.model.reloadable_layers()):
            raise RuntimeError("post_load_weights was not called after a load")
        if self.moe_load_balancer is not None and not self.moe_load_balancer.is_current:
            raise RuntimeError("the balancer was not told of new experts")
        if request.sequence is None:
            request.sequence = self.kv.start(id(request), request.token_ids)
            fresh = request.token_ids[request.sequence.length :]
            token = next_token(self.model, fresh, request.sequence)
            self.kv.prefix.store(request.token_ids, request.sequence)
            return token
        return next_token(self.model, request.new[-1:], request.sequence)


class Executor:
    """See the module. The loop runs when somebody calls `run_once`, in the rank's own thread."""

    def __init__(self, model_engine: ModelEngine, group: TpGroup) -> None:
        self.model_engine = model_engine
        mapping = SimpleNamespace(
            world_size=group.size,
            tp_rank=group.rank,
            tp_size=group.size,
            pp_rank=0,
            pp_size=1,
            moe_ep_rank=0,
            moe_ep_size=1,
        )
        self.dist = SimpleNamespace(rank=group.rank, world_size=group.size, mapping=mapping)
        self.active_requests: list[Request] = []
        self.waiting_queue: deque[Request] = deque()
        self._parked = False

    def enqueue_request(self, token_ids: list[int], max_tokens: int) -> Request:
        """Queue one."""
        request = Request(token_ids=token_ids, max_tokens=max_tokens)
        self.waiting_queue.append(request)
        return request

    def cancel_request(self, request: Request) -> None:
        """Forget one."""
        for requests in (self.waiting_queue, self.active_requests):
            if request in requests:
                requests.remove(request)
        self.model_engine.kv.free([id(request)])

    def abort_all_requests(self) -> None:
        """End all, with an error."""
        for request in [*self.active_requests, *self.waiting_queue]:
            request.error = "aborted"
            self.cancel_request(request)

    def run_once(self) -> bool:
        """One turn of the loop; False where it is parked."""
        if self._parked:
            return False
        self._step()
        return True

    def reset_prefix_cache(self) -> None:
        """Nothing computed before is used again."""
        self.model_engine.kv.flush()

    @contextmanager
    def control_action(self, drain: bool = True) -> Iterator[Executor]:
        """No step runs within; with `drain` requests have finished before.

        Raises:
            RuntimeError: entered within another.
        """
        if self._parked:
            raise RuntimeError("control_action() is not re-entrant")
        while drain and (self.active_requests or self.waiting_queue):
            self._step()
        self._parked = True
        try:
            yield self
        finally:
            self._parked = False

    def _step(self) -> None:
        self.active_requests += self.waiting_queue
        self.waiting_queue.clear()
        for request in list(self.active_requests):
            try:
                request.new.append(self.model_engine.forward(request))
            except Exception as error:  # noqa: BLE001 as the engine: the request fails, the loop goes on
                request.error = str(error)
            if request.done:
                self.cancel_request(request)
