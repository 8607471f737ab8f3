"""Who a rank of TensorRT-LLM is."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from ckpt_core.contract import DeviceKind, RankInfo
from ckpt_core.errors import EngineStateError
from ckpt_trtllm import compat

if TYPE_CHECKING:
    import torch


class Identity:
    """Of one worker.

    Attributes:
        rank: among all ranks of the instance.
        instance_id: one per engine start; "" on a rank of several that was not told.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._place = compat.place_of(worker)
        self.rank = self._place["rank"]
        self.instance_id = uuid.uuid4().hex if self._place["world_size"] == 1 else ""

    def tell(self, instance_id: str) -> None:
        """Ranks cannot agree on an instance by themselves: the first who asks all of them brings it."""
        self.instance_id = self.instance_id or instance_id

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        import torch

        first = next(compat.model_of(self._worker).parameters(), None)
        return torch.device("cuda", int(self._worker.device_id)) if first is None else first.device

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""
        device = self.device
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    def info(self) -> RankInfo:
        """For `ckpt_identify`.

        Raises:
            EngineStateError: nobody told the instance.
        """
        if not self.instance_id:
            raise EngineStateError(
                f"rank {self.rank} of {self._place['world_size']} has no instance id; ask the status of all ranks first"
            )
        device = self.device
        return RankInfo(
            instance_id=self.instance_id,
            device_kind=DeviceKind(device.type),
            device_index=device.index or 0,
            device_uuid=_uuid_of(device) or f"cpu-{self.instance_id}-{self.rank}",
            **self._place,
        )


def _uuid_of(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    import torch

    text = str(torch.cuda.get_device_properties(device).uuid)
    return text if text.startswith("GPU-") else f"GPU-{text}"
