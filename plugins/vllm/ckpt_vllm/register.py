"""Entry point `vllm.general_plugins`: vLLM calls it in the API server, in the engine core and in every worker."""

from __future__ import annotations

BACKEND = "ckpt"


def register() -> None:
    """Register the weight-transfer engine, and install the guard. May be called again."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from ckpt_vllm import guard

    guard.install()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "ckpt_vllm.transfer", "CkptTransferEngine")
