"""Tensor parallel group of a rank: two collectives, over shared memory where they are small, else over gloo."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ckpt_conformance.reference.exchange import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class TpGroup:
    """Position of a rank. With `size` 1 no process group is needed, and none is used."""

    rank: int = 0
    size: int = 1
    exchange: Exchange | None = None

    def shard(self, total: int) -> int:
        """Elements of a dimension that one rank holds."""
        assert total % self.size == 0, f"{total} is not divisible by {self.size}; ModelConfig.check_tp comes first"
        return total // self.size

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, accumulated in float32 whatever the dtype. May write into `partial`."""
        if self.size == 1:
            return partial
        total = partial.to(device="cpu", dtype=torch.float32)
        if self.exchange is not None and self.exchange.fits(total):
            total = self.exchange.parts(total).sum(dim=0).view(partial.shape)
        else:
            dist.all_reduce(total)
        return total.to(device=partial.device, dtype=partial.dtype)

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' parts along the last dimension, in float32."""
        if self.size == 1:
            return part.float()
        mine = part.to(device="cpu", dtype=torch.float32).contiguous()
        if self.exchange is not None and self.exchange.fits(mine):
            shared = self.exchange.parts(mine)
            parts = [shared[rank].view(mine.shape) for rank in range(self.size)]
        else:
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
        return torch.cat(parts, dim=-1).to(part.device)


def open_store(host: str, port: int, *, listen_fd: int, timeout_s: float) -> TCPStore:
    """The ranks' rendezvous, without files.

    Args:
        host, port: where it listens.
        listen_fd: the listening socket, for the rank that hosts it; else -1.
        timeout_s: for the others to come.
    """
    return TCPStore(
        host,
        port,
        is_master=listen_fd >= 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listen_fd if listen_fd >= 0 else None,
    )


def join_group(store: TCPStore, *, rank: int, size: int, timeout_s: float, exchange: Exchange | None = None) -> TpGroup:
    """Form the process group. `timeout_s` is also the deadline of each collective."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    return TpGroup(rank=rank, size=size, exchange=exchange)
