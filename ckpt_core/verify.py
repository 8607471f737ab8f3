"""Proof that what a rank holds is what was sent.

ARRIVAL: every tensor's bytes are digested as they lie in the ring, before the engine's loader sees them, and compared with
the manifest. The fingerprint digests the live weights after the load; equal fingerprints mean equal bits on that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import xxhash

from ckpt_core.contract import LiveTensor
from ckpt_core.errors import VerificationError
from ckpt_core.manifest import TensorMeta

if TYPE_CHECKING:
    import torch


class ArrivalDigest:
    """Digests tensors as they arrive, whole or cut into consecutive parts.

    Args:
        expected: content digests, by position in the manifest.

    Attributes:
        digested_bytes: bytes that were compared with the manifest so far.
    """

    def __init__(self, expected: Sequence[str]) -> None:
        self._expected = expected
        self._open: dict[str, tuple[xxhash.xxh3_128, int]] = {}
        self.digested_bytes = 0

    def add(self, position: int, meta: TensorMeta, part: torch.Tensor) -> None:
        """Take the next bytes of a tensor (uint8, on CPU, contiguous).

        Raises:
            VerificationError: the tensor is complete and its digest is not the manifest's.
        """
        state, seen = self._open.pop(meta.name, (xxhash.xxh3_128(), 0))
        state.update(part.numpy().data)
        seen += part.numel()
        if seen < meta.size_bytes:
            self._open[meta.name] = (state, seen)
            return
        self.digested_bytes += seen
        if state.hexdigest() != self._expected[position]:
            raise VerificationError(
                f"tensor {meta.name!r} arrived with digest {state.hexdigest()}, expected {self._expected[position]}: "
                "it was changed on the way, or its file was written during the update"
            )


def fingerprint(live: Mapping[str, LiveTensor]) -> str:
    """xxh3-128, in hex, over names, dtypes, shapes and bytes of all live tensors of a rank."""
    state = xxhash.xxh3_128()
    for name in sorted(live):
        tensor = live[name].tensor.detach()
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(_bytes_of(tensor).numpy().data)
    return state.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
