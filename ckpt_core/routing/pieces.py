"""Packs what hosts need into buckets of one holder and one set of receivers, as columns.

A piece is a box of a tensor, packed row-major when its holder fills the bucket: a host that needs half of the columns
receives half of the bytes. A host gets only buckets of which it needs every byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckpt_core.bucket import ALIGN_BYTES
from ckpt_core.layout import Box
from ckpt_core.manifest import Manifest
from ckpt_core.routing.cells import cells
from ckpt_core.routing.columns import Ints, ints, ranges, starts_of
from ckpt_core.routing.host_classes import HostClasses
from ckpt_core.routing.needs import Patterns
from ckpt_core.routing.topology import Topology

_PIECES_PER_BUCKET = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """What is sent, in the order of the checkpoint's modules; one place per piece.

    Attributes:
        tensor: index in the manifest.
        box: index in `boxes`.
        size_bytes: packed, without padding.
        receivers: index in `receiver_sets`.
        boxes: the different boxes.
        receiver_sets: bit sets of kinds of hosts.
    """

    tensor: Ints
    box: Ints
    size_bytes: Ints
    receivers: Ints
    boxes: tuple[Box, ...]
    receiver_sets: tuple[int, ...]


def cut_pieces(manifest: Manifest, patterns: Patterns, hosts: HostClasses, order: Ints, *, bucket_bytes: int) -> Pieces:
    """Cut what hosts need into pieces of at most a quarter of a bucket, but for what must come in one piece."""
    boxes: dict[Box, int] = {}
    sets: dict[int, int] = {}
    rows: list[tuple[int, int, int]] = []
    counts = []
    most_bytes = max(bucket_bytes // _PIECES_PER_BUCKET, 1)
    for example in patterns.examples.tolist():
        meta = manifest.tensors[example]
        needed = [
            [box for member in members for box in patterns.needed(member, example, meta.shape)]
            for members in hosts.rank_classes
        ]
        if patterns.uncut[example]:
            parts = [(Box.whole(meta.shape), sum(1 << kind for kind, boxes in enumerate(needed) if boxes))]
        else:
            parts = [
                (part, mask)
                for cell, mask in cells(meta.shape, needed)
                for part in cell.split_rows(most_bytes, meta.dtype.itemsize)
            ]
        counts.append(len(parts))
        for part, mask in parts:
            size = part.size * meta.dtype.itemsize
            rows.append((boxes.setdefault(part, len(boxes)), size, sets.setdefault(mask, len(sets))))
    of_pattern = ints(rows).reshape(-1, 3)
    wanted = order[patterns.of_tensor[order] >= 0]
    pattern = patterns.of_tensor[wanted]
    numbers = ints(counts)
    chosen = ranges(starts_of(numbers)[pattern], numbers[pattern])
    return Pieces(
        tensor=np.repeat(wanted, numbers[pattern]),
        box=of_pattern[chosen, 0],
        size_bytes=of_pattern[chosen, 1],
        receivers=of_pattern[chosen, 2],
        boxes=tuple(boxes),
        receiver_sets=tuple(sets),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Pieces in buckets, in the order of the checkpoint's modules.

    Attributes:
        pieces: sorted by bucket.
        offset_bytes: of each piece in its bucket, aligned.
        first_piece: of each bucket; one more for the end.
        size_bytes, receivers, holders: of each bucket: size with padding, index of the receiver set, of the holder set.
    """

    pieces: Pieces
    offset_bytes: Ints
    first_piece: Ints
    size_bytes: Ints
    receivers: Ints
    holders: Ints


def pack(pieces: Pieces, topology: Topology, *, bucket_bytes: int, window_bytes: int) -> Packed:
    """Fill buckets evenly: those of one holder and one receiver set, in one window, differ by a piece at most.

    Args:
        topology: who holds which tensor.
        window_bytes: stretch of the checkpoint in which buckets are filled, so that a module's bytes come close
            together.
    """
    holder_of = topology.holder_of
    padded = -(-pieces.size_bytes // ALIGN_BYTES) * ALIGN_BYTES
    holders = holder_of[pieces.tensor]
    window = starts_of(padded)[:-1] // max(window_bytes, 1)
    kinds = int(holders.max(initial=0)) + 1
    key = (window * kinds + holders) * len(pieces.receiver_sets) + pieces.receivers
    bucket = _fill(key, padded, bucket_bytes)
    _, first = np.unique(bucket, return_index=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    bucket = order[bucket]
    by_bucket = np.argsort(bucket, kind="stable")
    first_piece = starts_of(np.bincount(bucket, minlength=len(first)))
    ends = starts_of(padded[by_bucket])
    return Packed(
        pieces=Pieces(
            tensor=pieces.tensor[by_bucket],
            box=pieces.box[by_bucket],
            size_bytes=pieces.size_bytes[by_bucket],
            receivers=pieces.receivers[by_bucket],
            boxes=pieces.boxes,
            receiver_sets=pieces.receiver_sets,
        ),
        offset_bytes=ends[:-1] - np.repeat(ends[first_piece[:-1]], np.diff(first_piece)),
        first_piece=first_piece,
        size_bytes=np.diff(ends[first_piece]),
        receivers=pieces.receivers[by_bucket][first_piece[:-1]],
        holders=holders[by_bucket][first_piece[:-1]],
    )


def _fill(key: Ints, padded: Ints, bucket_bytes: int) -> Ints:
    """Bucket of each piece: each key's bytes are cut into equal lengths, at the next piece."""
    by_key = np.argsort(key, kind="stable")
    sizes = padded[by_key]
    _, first, group = np.unique(key[by_key], return_index=True, return_inverse=True)
    ends = starts_of(sizes)
    group_bytes = np.diff(ends[np.append(first, len(sizes))])
    # what may not be cut can be larger than a bucket: it must not make the others small
    room = max(bucket_bytes - int(sizes[sizes <= bucket_bytes // 2].max(initial=0)), 1)
    number = np.maximum(-(-group_bytes // room), 1)
    place = (ends[:-1] - ends[first][group]) * number[group] // np.maximum(group_bytes[group], 1)
    _, filled = np.unique(starts_of(number)[group] + np.minimum(place, number[group] - 1), return_inverse=True)
    bucket = np.empty(len(key), dtype=np.int64)
    bucket[by_key] = filled.reshape(-1)
    return bucket
