"""`--weight-transfer-config '{"backend": "ckpt"}'`: vLLM's own extension point for weight transfer.

Start and finish are bookkeeping of vLLM around the one call that does it all: `update_weights` carries the rendezvous and
blocks until the update is over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ckpt_vllm import compat
from ckpt_vllm.attach import FACTS_KEY, attach

_log = logging.getLogger("vllm.ckpt")  # below vLLM's own logger, whose handler shows it


@dataclass
class CkptInitInfo(WeightTransferInitInfo):
    """Nothing: the rendezvous comes with each update."""


@dataclass
class CkptUpdateInfo(WeightTransferUpdateInfo):
    """Fields of `ckpt_core.contract.Rendezvous`, and what the engine core adds on the way."""

    rendezvous: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] | None = None


class CkptTransferEngine(WeightTransferEngine):  # type: ignore[type-arg,misc]
    """No method raises: with several ranks that would desynchronise vLLM's RPC for good."""

    init_info_cls = CkptInitInfo
    update_info_cls = CkptUpdateInfo
    ckpt_worker: Any = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> CkptInitInfo:
        """Whatever is in it."""
        return CkptInitInfo()

    def init_transfer_engine(self, init_info: CkptInitInfo) -> None:
        """Forget a session whose controller died between start and finish."""
        if self.ckpt_worker is not None:
            compat.end_stale_session(self.ckpt_worker)

    def start_weight_update(self) -> None:
        """Bookkeeping."""

    def finish_weight_update(self) -> None:
        """Bookkeeping."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take part in an update; blocks until it is over. How it ended travels on the update's own socket."""
        if self.ckpt_worker is None:
            _log.error("the ckpt plugin was not loaded before vLLM's worker; is VLLM_PLUGINS set without it?")
            return
        rendezvous = update_info.get("rendezvous")
        facts = update_info.get(FACTS_KEY)
        result = attach(self.ckpt_worker, rendezvous if isinstance(rendezvous, Mapping) else {}, facts)
        _log.info("rank %s: %s %s", result["rank"], result["outcome"], result["error"])

    def receive_weights(self, update_info: CkptUpdateInfo) -> None:
        """Not used: `update_weights` is overridden, for the parsing that comes before this may raise."""
        raise NotImplementedError("weights come through update_weights")

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.26, gone in 0.32: without it the class cannot be instantiated there."""
        raise NotImplementedError("trainers call ckpt_core.Updater")
