"""What vLLM's engine core knows and its workers do not: whether the scheduler is paused, and what sleeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ckpt_core.errors import EngineStateError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """As of the moment when an attach call passed the engine core.

    Attributes:
        known: someone looked; without our plugin in the engine core nobody does.
        paused: the scheduler starts no step.
        asleep: some memory is given back; `weights_asleep`: that of the weights.
        unfinished: requests in flight.
        met: requests in flight when the last pause began; None before the first.
        version: weight version as vLLM knows it.
    """

    known: bool = False
    paused: bool = False
    asleep: bool = False
    weights_asleep: bool = False
    unfinished: int = 0
    met: int | None = None
    version: str = ""

    @property
    def is_idle(self) -> bool:
        """Paused, and nothing is left that a step could be made for."""
        return self.known and self.paused and not self.unfinished

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> EngineFacts:
        """Inverse of `to_json`; fields of other versions of this plugin are left out."""
        return cls(**{name: given[name] for name in cls.__dataclass_fields__ if name in given})

    def to_json(self) -> dict[str, Any]:
        """For a trip through vLLM's RPC."""
        return asdict(self)

    def check_updatable(self) -> None:
        """Raise EngineStateError where an update must not begin."""
        if self.weights_asleep:
            raise EngineStateError("vLLM's weights are asleep: wake them first (POST /wake_up?tags=weights)")
        if self.known and not self.paused:
            raise EngineStateError(
                "vLLM is not paused: requests would mix old and new weights; pause it first (POST /pause)"
            )
