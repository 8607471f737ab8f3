"""How one model takes new weights: straight into its parameters, or through vLLM's layerwise reload.

DIRECT hands the bucket's tensors to the model's own `load_weights`, which copies them into the live parameters. Sound only
where the parameters still are as that loader wants them. RELOAD is vLLM's own way for all others (quantised, repacked,
derived): modules go back to load format on the meta device, are materialised and processed when complete, and copied into
the storage that they had. That bracket keeps what it is given until a module is complete: tensors are cloned for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ckpt_core.record.thin import retained_bytes
from ckpt_vllm import compat

if TYPE_CHECKING:
    import torch

_PLAIN_EXPERTS = frozenset({"TRITON", "BATCHED_TRITON"})  # kernels that take the weights as they are loaded


class Way(Enum):
    """How a model is loaded; see the module. AUTO: DIRECT where it is sound."""

    AUTO = "auto"
    DIRECT = "direct"
    RELOAD = "reload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way, and why: the first module that made the difference."""

    way: Way
    reason: str


def choose(model: Any, wanted: Way = Way.AUTO) -> Choice:
    """DIRECT only where no module was repacked, quantised or had anything derived from its weights."""
    if wanted is not Way.AUTO:
        return Choice(way=wanted, reason="asked for")
    for name, module in model.named_modules():
        if reason := _why_not_direct(module):
            return Choice(way=Way.RELOAD, reason=f"{name or type(module).__name__}: {reason}")
    return Choice(way=Way.DIRECT, reason="every parameter is as it was loaded")


def _why_not_direct(module: Any) -> str:  # noqa: PLR0911 a list of reasons
    if compat.is_latent_attention(module):
        return "matrices are derived from its weights"
    if compat.is_packed(module):
        return "its weight was packed for the CPU"
    backend = compat.expert_backend(module)
    if backend and backend not in _PLAIN_EXPERTS:
        return f"experts are repacked for {backend}"
    method = compat.quantisation_of(module)
    if not backend and not compat.is_attention(module) and not compat.is_plain(module):
        return method
    for name, expected in compat.load_format(module).items():
        live = module._parameters.get(name)
        if live is None or live.shape != expected.shape or live.dtype != expected.dtype:
            return f"its {name} is not as it was loaded"
        if live.stride() != expected.stride():
            return f"its {name} was transposed or padded"
    return ""


class DirectLoader:
    """See the module. Nothing is kept, so nothing has to be undone: only what was written is wrong."""

    retained_bytes = 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self.touched = False

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Into the live parameters."""
        self.touched = True
        self._model.load_weights(iter(tensors))

    def incomplete(self) -> list[tuple[str, int, int]]:
        """What was not sent keeps its values, exactly."""
        return []

    def finish(self) -> None:
        """Nothing is derived."""

    def abort(self) -> None:
        """Nothing is held."""


class ReloadLoader:
    """See the module. It opens the bracket; `finish` closes it, `abort` undoes it.

    vLLM has no abort: this class remembers which tensor objects every module had, and puts the references back. Modules
    that were complete have the new values in the old storage then, the others are untouched, and begin works again.
    """

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        # a rotary table is shared by the draft model: what its bracket holds already is not ours to put back
        held = {id(module) for module, _ in compat.pending_modules(model)}
        own = [module for module in model.modules() if id(module) not in held]
        self._before = [(module, _tensors_of(module), compat.derived_of(module)) for module in own]
        self._tied = _tied_modules(model)
        self.touched = False
        self.retained_bytes = 0
        compat.begin_reload(model)
        compat.prepare_modules(model)

    def load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Clones, for the bracket holds them beyond this call; thin ones own their slices."""
        self.touched = True
        self._model.load_weights(
            (name, tensor.clone() if retained_bytes(tensor) is None else tensor) for name, tensor in tensors
        )
        self.retained_bytes = compat.retained_bytes(self._model)

    def incomplete(self) -> list[tuple[str, int, int]]:
        """Modules that lack elements, with how many they got and want. A tied one gets nothing of its own."""
        found = compat.incomplete_modules(self._model)
        return [(name, loaded, total) for module, name, loaded, total in found if id(module) not in self._tied]

    def finish(self) -> None:
        """Process the rest."""
        self.touched = True
        compat.finish_reload(self._model, self._model_config)
        compat.finish_modules(self._model)
        self._before = []

    def abort(self) -> None:
        """Put back every module's own tensors."""
        pending = {id(module) for module, _ in compat.pending_modules(self._model)}
        compat.forget_reload(self._model)
        for module, (parameters, buffers, transient), derived in self._before:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)
            if id(module) in pending:
                compat.put_derived_back(module, derived)
        self._before = []


Loader = DirectLoader | ReloadLoader


def _tied_modules(model: Any) -> set[int]:
    """Ids of modules whose parameters are another's, which comes first."""
    first_with: dict[int, int] = {}
    tied = set()
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own and all(first_with.setdefault(id(parameter), id(module)) != id(module) for parameter in own):
            tied.add(id(module))
    return tied


def _tensors_of(module: Any) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    return dict(module._parameters), dict(module._buffers), set(module._non_persistent_buffers_set)


def _put_back(live: dict[str, Any], before: Mapping[str, Any]) -> None:
    live.clear()
    live.update(before)
