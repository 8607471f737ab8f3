"""What classes of ranks need of a checkpoint, as columns: ranks of one class need the same slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt_core.errors import CoverageError
from ckpt_core.layout import Box, Layout
from ckpt_core.manifest import Manifest
from ckpt_core.routing.columns import Bools, Ints, ints

_NOTHING, _WHOLE, _FIRST_PARTS = 0, 1, 2
WHOLE = -1

Parts = tuple[Box, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassNeeds:
    """What each rank of a class needs: a layout without an object per tensor.

    Attributes:
        tensors: index in the manifest, any number of times.
        parts: index in `boxes`, or WHOLE.
        boxes: the different slices; models repeat a few.
        uncut: index of tensors that must come in one piece.
    """

    tensors: Ints
    parts: Ints
    boxes: Parts
    uncut: Ints = field(default_factory=lambda: ints([]))

    @classmethod
    def of(cls, layout: Layout, manifest: Manifest) -> ClassNeeds:
        """The needs that a layout states.

        Raises:
            ManifestError: it names a tensor that the checkpoint does not have.
        """
        numbers: dict[Box, int] = {}
        tensors = [manifest.index_of(entry.tensor) for entry in layout.entries]
        parts = [
            WHOLE if entry.box is None else numbers.setdefault(entry.box, len(numbers)) for entry in layout.entries
        ]
        uncut = [tensor for tensor, entry in zip(tensors, layout.entries, strict=True) if not entry.cut]
        return cls(tensors=ints(tensors), parts=ints(parts), boxes=tuple(numbers), uncut=ints(uncut))


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Tensors that are alike in shape, type and who needs what of them: worked out once for all of a kind.

    Attributes:
        of_tensor: pattern of each tensor; -1 where nobody needs it.
        examples: one tensor of each pattern.
        part_ids: by class and tensor: index in `parts`.
        uncut: by tensor: whether somebody must have it in one piece, so that everybody gets all of it.
        parts: the different needs of one tensor: no box for nothing; None for the whole.
    """

    of_tensor: Ints
    examples: Ints
    part_ids: Ints
    parts: tuple[Parts | None, ...]
    uncut: Bools

    def needed(self, rank_class: int, tensor: int, shape: tuple[int, ...]) -> Parts:
        """Boxes that a class needs of a tensor."""
        parts = self.parts[self.part_ids[rank_class, tensor]]
        return (Box.whole(shape),) if parts is None else parts


def find_patterns(manifest: Manifest, classes: Sequence[ClassNeeds]) -> Patterns:
    """Group tensors by what decides how they are cut.

    Raises:
        CoverageError: a slice is not inside its tensor.
    """
    numbers: dict[Parts | None, int] = {(): _NOTHING, None: _WHOLE}
    part_ids = np.stack([_part_ids(needs, len(manifest.tensors), numbers) for needs in classes])
    kinds: dict[object, int] = {}
    kind = ints([kinds.setdefault((meta.shape, meta.dtype), len(kinds)) for meta in manifest.tensors])
    uncut = np.zeros(len(manifest.tensors), dtype=np.bool_)
    for needs in classes:
        uncut[needs.uncut] = True
    examples, of_tensor = _distinct(np.vstack([part_ids, (2 * kind + uncut)[None]]))
    wanted = (part_ids[:, examples] != _NOTHING).any(axis=0)
    renumbered = np.where(wanted, np.cumsum(wanted) - 1, -1)
    found = Patterns(
        of_tensor=renumbered[of_tensor],
        examples=examples[wanted],
        part_ids=part_ids,
        parts=tuple(numbers),
        uncut=uncut,
    )
    _check_inside(manifest, found)
    return found


def _part_ids(needs: ClassNeeds, tensors: int, numbers: dict[Parts | None, int]) -> Ints:
    """One class's row: which of the known needs it has of each tensor."""
    single = ints([numbers.setdefault((box,), len(numbers)) for box in needs.boxes] + [_WHOLE])
    row = np.zeros(tensors, dtype=np.int64)
    row[needs.tensors] = single[needs.parts]
    if len(needs.tensors) > 1 and np.bincount(needs.tensors).max() > 1:
        for tensor, count in Counter(needs.tensors.tolist()).items():
            if count > 1:
                chosen = sorted(set(needs.parts[needs.tensors == tensor].tolist()))
                boxes = None if WHOLE in chosen else tuple(needs.boxes[part] for part in chosen)
                row[tensor] = numbers.setdefault(boxes, len(numbers))
    return row


def _distinct(columns: Ints) -> tuple[Ints, Ints]:
    """Index of one example of each different column, and which of these each column is.

    Columns are compared by a 64-bit hash first, and then with their example: sorting hashes is ten times faster
    than sorting columns.
    """
    weights = np.random.Generator(np.random.PCG64(1)).integers(1, 2**63, len(columns), dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros(columns.shape[1], dtype=np.uint64)
    for row, weight in zip(columns, weights, strict=True):
        mixed = (row.astype(np.uint64) + np.uint64(1)) * weight
        hashes = (hashes ^ (mixed >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + mixed
    _, examples, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    if not (columns == columns[:, examples[inverse]]).all():
        _, examples, inverse = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    return examples.astype(np.int64), inverse.reshape(-1).astype(np.int64)


def _check_inside(manifest: Manifest, patterns: Patterns) -> None:
    for example in patterns.examples.tolist():
        meta = manifest.tensors[example]
        for rank_class in range(len(patterns.part_ids)):
            for box in patterns.needed(rank_class, example, meta.shape):
                if not box.fits(meta.shape):
                    raise CoverageError(
                        f"tensor {meta.name!r:.200}: class {rank_class}: expected a slice inside {list(meta.shape)}, "
                        f"got start {list(box.start)} shape {list(box.shape)}; the layout was not made for this "
                        "checkpoint: attach again"
                    )
