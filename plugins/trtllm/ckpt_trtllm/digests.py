"""Digests of live tensors, by which tests compare ranks that they cannot reach."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_core.contract import LiveTensor


def digests_of(live: Mapping[str, LiveTensor]) -> dict[str, str]:
    """xxh3-128 of the bytes of each, by name."""
    import torch
    import xxhash

    return {
        name: xxhash.xxh3_128_hexdigest(
            item.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        for name, item in live.items()
        if item.tensor.numel()
    }
