"""`--worker-extension-cls ckpt_vllm.extension.CkptWorkerExtension`: vLLM mixes this class into its worker."""

from __future__ import annotations

from typing import Any

from ckpt_vllm import guard
from ckpt_vllm.attach import attach, rank_status

guard.install()  # also where VLLM_PLUGINS keeps general plugins out


class CkptWorkerExtension:
    """Methods that POST /collective_rpc can call. vLLM refuses names that its worker has, so all begin with `ckpt_`."""

    def ckpt_attach(self, rendezvous: dict[str, Any], engine: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take part in an update; see `ckpt_vllm.attach`. The engine core adds `engine` on the way."""
        return attach(self, rendezvous, engine)

    def ckpt_status(self) -> dict[str, Any]:
        """What this rank holds."""
        return rank_status(self)
