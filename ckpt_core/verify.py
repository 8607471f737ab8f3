"""Proof that what a rank holds is what the agents read.

Agents digest in their host pool what each rank takes, before it moves. ARRIVAL: a rank digests it as it lies in the
ring; on CPU before the engine's loader sees them, on an accelerator beside it. LIVE: it digests the live weights that it was
copied to, after all is done. Either way no rank commits before its digests are equal. The fingerprint digests all that is
live; equal fingerprints mean equal bits on that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash

from ckpt_core.config import VerifyLevel
from ckpt_core.contract import LiveTensor
from ckpt_core.device_digest import Leaves, folded
from ckpt_core.errors import VerificationError, WireError
from ckpt_core.incoming import IncomingBucket, TakenPart


class Verifier:
    """Compares digests of what one rank takes.

    Args:
        level: NONE compares nothing.
        parts: digests by bucket, see `wire.Begin`.

    Attributes:
        arrived_bytes, live_bytes: compared so far, as they arrived and as they live.
    """

    def __init__(self, level: VerifyLevel, parts: Mapping[int, bytes]) -> None:
        self.level = level
        self._expected = {bucket: np.frombuffer(digests, dtype="<u8") for bucket, digests in parts.items()}
        self._started: list[tuple[IncomingBucket, Sequence[TakenPart], torch.Tensor, Sequence[int]]] = []
        self.arrived_bytes = 0
        self.live_bytes = 0

    def arrived(self, bucket: IncomingBucket, parts: Sequence[TakenPart]) -> None:
        """These of a bucket are in the ring.

        Raises:
            WireError: what they should be was not told.
            VerificationError: on CPU, where a digest differs; on an accelerator `settle` does.
        """
        if len(self._expected.get(bucket.load.index, ())) != len(bucket.parts):
            raise WireError(
                f"bucket {bucket.load.index}: expected digests of {len(bucket.parts)} parts, got "
                f"{len(self._expected.get(bucket.load.index, ()))}; install the same ckpt-core on both sides"
            )
        if not parts:
            return
        leaves = Leaves([_in_ring(bucket, part) for part in parts])
        self._started.append((bucket, parts, leaves.compute(), leaves.sizes_bytes))
        if not leaves.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for what was started.

        Raises:
            VerificationError: a digest differs.
        """
        started, self._started = self._started, []
        for bucket, parts, leaves, sizes in started:
            for part, digest in zip(parts, folded(leaves, sizes), strict=True):
                self._compare(bucket.load.index, part, digest, "arrived")
            self.arrived_bytes += sum(sizes)

    def live(self, bucket: int, part: TakenPart, digest: int) -> None:
        """A part of a bucket lives with this digest.

        Raises:
            VerificationError: it is another one.
        """
        self._compare(bucket, part, digest, "lives")
        self.live_bytes += part.size_bytes

    def _compare(self, bucket: int, part: TakenPart, digest: int, how: str) -> None:
        if digest != (expected := int(self._expected[bucket][part.number])):
            raise VerificationError(
                f"tensor {part.item.name!r:.200} (part {part.number} of bucket {bucket}, {part.size_bytes} bytes): {how} with "
                f"digest {digest:016x}, expected {expected:016x}: changed on the way, or its file written meanwhile; "
                "update again, and test the memory of this host if it comes again"
            )


def _in_ring(bucket: IncomingBucket, part: TakenPart) -> torch.Tensor:
    """Bytes of a part: in place where they follow each other, else packed."""
    if part.whole:
        return bucket.place.bytes(part.offset_bytes, part.size_bytes)
    region = part.region
    return part.item.strided(region.size, region.stride, region.offset).contiguous()


def fingerprint(live: Mapping[str, LiveTensor]) -> str:
    """xxh3-128, in hex, over names, dtypes, shapes and digests of the bytes of all live tensors of a rank."""
    names = sorted(live)
    tensors = [live[name].tensor.detach() for name in names]
    state = xxhash.xxh3_128()
    for name, tensor, digest in zip(names, tensors, _digests(tensors), strict=True):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{digest:016x}\0".encode())
    return state.hexdigest()


def _digests(tensors: Sequence[torch.Tensor]) -> list[int]:
    """In place, device by device, where bytes follow each other; else of one copy at a time."""
    found: dict[int, int] = {}
    places: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if tensor.is_contiguous() and not tensor.is_conj():
            places.setdefault(tensor.device, []).append(number)
        else:
            found[number] = Leaves([tensor.resolve_conj().contiguous()]).digests()[0]
    for numbers in places.values():
        found |= dict(zip(numbers, Leaves([tensors[number] for number in numbers]).digests(), strict=True))
    return [found[number] for number in range(len(tensors))]
