"""Small collectives through shared memory: on CPU the latency of a socket round trip is longer than a layer.

Engines do the same on CPU beside their process group (vLLM and SGLang have a shared-memory all-reduce). Each rank writes
into its own slot and publishes a sequence number; slots come in pairs, and no rank can be two exchanges ahead, because
it needs everybody's last one first. The memory has no name: it is gone with its last process.
"""

from __future__ import annotations

import mmap
import os
import time

import numpy as np
import torch

from ckpt_core.errors import PeerLost

SLOT_BYTES = 1 << 20
_LINE_BYTES = 64  # one cache line for each rank's sequence number
_SPINS = 8
_NAP_S = 30e-6
_LONGEST_NAP_S = 300e-6


class Exchange:
    """What one rank sees of the shared memory. Payloads are float32 of up to SLOT_BYTES, the same size on every rank.

    The order of stores, payload first and then the number, is kept by x86; elsewhere the interpreter's own locks and
    the system call between two looks order them in practice.
    """

    def __init__(self, fd: int, *, rank: int, size: int, timeout_s: float) -> None:
        self._rank, self._timeout_s = rank, timeout_s
        size_bytes = size * (_LINE_BYTES + 2 * SLOT_BYTES)
        os.ftruncate(fd, size_bytes)  # every rank does, to the same size
        memory = mmap.mmap(fd, size_bytes)
        numbers = np.frombuffer(memory, dtype=np.int64, count=size * _LINE_BYTES // 8)
        self._numbers = numbers.reshape(size, -1)[:, 0]
        slots = np.frombuffer(memory, dtype=np.float32, offset=size * _LINE_BYTES)
        self._slots = torch.from_numpy(slots).view(2, size, -1)
        self._number = 0

    def fits(self, payload: torch.Tensor) -> bool:
        """Whether a payload can go this way."""
        return payload.numel() * 4 <= SLOT_BYTES

    def parts(self, mine: torch.Tensor) -> torch.Tensor:
        """Give this rank's payload (any shape), get all ranks' as [size, elements]: valid until the next call.

        Raises:
            PeerLost: another rank did not come before the deadline.
        """
        self._number += 1
        slots = self._slots[self._number % 2, :, : mine.numel()]
        slots[self._rank] = mine.reshape(-1)
        self._numbers[self._rank] = self._number
        self._wait()
        return slots

    def _wait(self) -> None:
        for _ in range(_SPINS):
            if self._numbers.min() >= self._number:
                return
        deadline, nap_s = time.monotonic() + self._timeout_s, _NAP_S
        while self._numbers.min() < self._number:
            time.sleep(nap_s)  # with more ranks than cores, the rank we wait for may need ours
            nap_s = min(1.5 * nap_s, _LONGEST_NAP_S)
            if time.monotonic() > deadline:
                late = [rank for rank, number in enumerate(self._numbers) if number < self._number]
                raise PeerLost(f"ranks {late} did not join a collective within {self._timeout_s:g} s")
