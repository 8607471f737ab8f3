"""The distinct parts of tensors that ranks take: digested once, told to every rank bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ckpt_core.assign import assign_owners
from ckpt_core.layout import Box, Layout
from ckpt_core.leaf_digest import Digests
from ckpt_core.manifest import Manifest
from ckpt_core.parts import parts_of
from ckpt_core.plan import Plan
from ckpt_core.wanted import Wanted
from ckpt_core.wire import PartOf


class PlanParts:
    """Of all ranks of an update.

    Attributes:
        parts: each once.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._numbers: dict[tuple[int, Box | None], int] = {}
        self._of_rank: list[dict[int, list[int]]] = []

    @property
    def parts(self) -> tuple[PartOf, ...]:
        """See the class."""
        return tuple(PartOf(tensor=tensor, box=box) for tensor, box in self._numbers)

    def add(self, plan: Plan, receiver: int, layout: Layout) -> None:
        """The next rank: it is receiver of that number in its host's plan."""
        boxes = Wanted(self._manifest, layout).boxes
        numbers = self._numbers
        mine: dict[int, list[int]] = {}
        for step in plan.steps:
            if receiver in step.receivers:
                pieces = step.bucket.pieces
                keys = [(pieces[part.piece].tensor, part.box) for part in parts_of(step.bucket, boxes)]
                mine[step.index] = [numbers.setdefault(key, len(numbers)) for key in keys]
        self._of_rank.append(mine)

    def add_parts(self, parts: Sequence[PartOf]) -> None:
        """The next rank: it takes these, all of them in bucket 0."""
        numbers = self._numbers
        self._of_rank.append({0: [numbers.setdefault((part.tensor, part.box), len(numbers)) for part in parts]})

    def dealt(
        self, agents: Sequence[int], host_of: Callable[[PartOf], int] = lambda _part: 0
    ) -> list[list[tuple[PartOf, ...]]]:
        """By host and agent, even in bytes. `agents`: how many each host has; `host_of`: one that can read a part."""
        at: list[list[PartOf]] = [[] for _ in agents]
        for part in self.parts:
            at[host_of(part)].append(part)
        return [self._among(mine, count) for mine, count in zip(at, agents, strict=True)]

    def _among(self, parts: Sequence[PartOf], count: int) -> list[tuple[PartOf, ...]]:
        owners = assign_owners([part_bytes(self._manifest, part) for part in parts], count)
        found: list[list[PartOf]] = [[] for _ in range(count)]
        for part, owner in zip(parts, owners, strict=True):
            found[owner].append(part)
        return [tuple(some) for some in found]

    def gathered(self, answers: Iterable[tuple[Sequence[PartOf], bytes]]) -> Digests:
        """Digests of all parts, out of those of some each."""
        found = np.zeros(len(self._numbers), dtype=np.uint64)
        for some, digests in answers:
            found[[self._numbers[part.tensor, part.box] for part in some]] = np.frombuffer(digests, dtype="<u8")
        return found

    def of_rank(self, rank: int, digests: Digests) -> dict[int, bytes]:
        """What `wire.Begin` tells a rank."""
        return {bucket: digests[numbers].astype("<u8").tobytes() for bucket, numbers in self._of_rank[rank].items()}


def part_bytes(manifest: Manifest, part: PartOf) -> int:
    """Bytes of a part."""
    if part.box is None:
        return manifest.sizes_bytes[part.tensor]
    return part.box.size * manifest.tensors[part.tensor].dtype.itemsize


NO_PARTS = PlanParts(Manifest(tensors=()))
