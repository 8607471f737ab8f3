"""One reload of TensorRT-LLM's model, in the order of its own weight update.

Before the first bucket, once: `pre_reload_weights` of every module. Each bucket: `model_loader.reload` with a part of the
checkpoint. At the end: `process_weights_after_loading` and `post_load_weights` of every module, the expert balancer, the caches.

A partial update does the same for the modules that it brings tensors for, and for no others: rebuilding a module destroys it, and
processing it twice does, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_trtllm import compat, held
from ckpt_trtllm.landing import is_above, is_below
from ckpt_trtllm.storage import Storage

if TYPE_CHECKING:
    import torch


class Cycle:
    """Of one rank.

    Args:
        worker: TensorRT-LLM's.
        features: of it.
        storage: lives longer than a cycle.
        landings: paths of the modules that tensors come for; None for all modules.

    Attributes:
        opened: modules may have been changed.
        retained_bytes: what the engine keeps of buckets, and what is in memory twice.
    """

    def __init__(
        self, worker: Any, features: compat.Features, storage: Storage, landings: Collection[str] | None
    ) -> None:
        self._worker = worker
        self._features = features
        self._storage = storage
        self._model = compat.model_of(worker)
        self._loader = compat.loader_of(worker)
        modules = list(compat.modules_of(self._model))
        self._loaded = [item for item in modules if landings is None or is_below(item[0], landings)]
        self._finished = [
            item for item in modules if landings is None or is_below(item[0], landings) or is_above(item[0], landings)
        ]
        self._baseline_bytes = held.own(compat.keepers_of(worker), ())
        self.opened = False
        self.retained_bytes = 0

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Give one bucket to the engine's loader, and keep nothing of it."""
        import torch

        if not self.opened:
            self.opened = True
            self._open()
        with torch.no_grad():
            self._loader.reload(self._model, dict(tensors), allow_partial_loading=True)
        kept = held.own(compat.keepers_of(self._worker), [tensor for _, tensor in tensors])
        self.retained_bytes = max(0, kept - self._baseline_bytes) + self._storage.size_bytes

    def finish(self) -> None:
        """Process what was loaded; tell the balancer; drop cached prefixes of the old weights."""
        import torch

        if not self.opened:
            self.opened = True
            self._open()
        with torch.no_grad():
            if self._features.loader_cycle:
                self._loader.finalize_update_weights()
            self._process()
            self._storage.fill()  # before anybody else looks where the weights are
            if (balancer := compat.balancer_of(self._worker)) is not None:
                balancer.register_weight_slots_after_to_cuda()
                balancer.finalize_model()
        self._worker.engine.reset_prefix_cache()

    def abort(self, reason: str) -> None:
        """Let the engine forget the cycle. What was rebuilt stays so: only a whole checkpoint mends it."""
        if self._features.loader_cycle:
            self._loader.abort_update_weights()
        if self._features.native_abort:
            self._worker.abort_update_weights(reason)

    def _open(self) -> None:
        if self._features.loader_cycle:
            self._loader.begin_update_weights()
        self._storage.remember(self._loaded)
        for _, module in self._loaded:
            _call(module, "pre_reload_weights")

    def _process(self) -> None:
        loaded = {id(module) for _, module in self._loaded}
        for _, module in self._finished:
            if id(module) in loaded:
                _call(module, "process_weights_after_loading")
            _call(module, "post_load_weights")


def check_capable(model: Any) -> None:
    """Ask every module whether it can be reloaded, where modules tell. Touches nothing.

    Raises:
        Exception: the engine's own, of the first that cannot.
    """
    for path, module in compat.modules_of(model):
        _call(module, "check_reload_capability")
        if compat.is_balanced(module):
            raise NotImplementedError(f"the experts of {path} are spread by a load balancer and cannot be loaded again")


def _call(module: Any, name: str) -> None:
    if callable(function := getattr(module, name, None)):
        function()
