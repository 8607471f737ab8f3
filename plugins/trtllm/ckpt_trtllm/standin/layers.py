"""Layers of the reference engine, given TensorRT-LLM's reload protocol."""

from __future__ import annotations

from typing import Any

import torch

from ckpt_conformance.reference.loadable import LoadableLayer, ShardId, quantise_rows

_kinds: dict[Any, Any] = {}


class Reloadable(LoadableLayer):
    """A layer that is loaded, processed, rebuilt and loaded again.

    Attributes:
        rebuild_tensor_metadata: what was processed, as it was before; `pre_reload_weights` makes it anew.
        stale: loaded since `post_load_weights`; the engine must not compute with it.
        loads: how often something was loaded.
    """

    rebuild_tensor_metadata: dict[str, torch.Tensor]
    stale: bool
    loads: int

    def check_reload_capability(self) -> None:
        """Can always be reloaded."""

    def pre_reload_weights(self) -> None:
        """Loadable again; what was there is gone."""
        for name in self.rebuild_tensor_metadata:
            for suffix in ("int8", "scale"):
                self._buffers.pop(f"{name}_{suffix}", None)
            self._arrived[name].clear()
            self._parameters[name] = None
            self._materialise(name)
            self.tensor(name).data.fill_(torch.nan)
        self.rebuild_tensor_metadata = {}

    def load(self, name: str, loaded: torch.Tensor, shard_id: ShardId) -> None:
        """A part of a parameter; a type that differs is cast."""
        if self._parameters.get(name) is None:
            raise RuntimeError(f"{type(self).__name__}.{name} is in its processed form and cannot be loaded")
        self.stale, self.loads = True, self.loads + 1
        super().load(name, loaded, shard_id)

    def process_weights_after_loading(self) -> None:
        """Quantise."""
        for name in [name for name, spec in self.specs.items() if spec.quantised]:
            if self._parameters.get(name) is None:
                raise RuntimeError(f"{type(self).__name__}.{name} was processed already")
            self._check_complete(name)
            self.rebuild_tensor_metadata[name] = self.tensor(name).to("meta")
            self._store_quantised(name, *quantise_rows(self.tensor(name)))
            self._parameters[name] = None

    def post_load_weights(self) -> None:
        """What is derived is that of the new weights."""
        self.stale = False


def make_reloadable(layer: Any) -> None:
    """Give a layer the protocol."""
    layer.__class__ = _reloadable(type(layer))
    layer.rebuild_tensor_metadata = {}
    layer.stale, layer.loads = True, 0


def _reloadable(kind: Any) -> Any:
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (Reloadable, kind), {})
    return _kinds[kind]
