"""The order of a checkpoint's tensors in which modules are complete one after the other: natural order of names."""

from __future__ import annotations

import numpy as np

from ckpt_core.bucket import natural_key
from ckpt_core.manifest import Manifest
from ckpt_core.routing.columns import Ints, ints

_END = "\n"


def natural_order(manifest: Manifest) -> Ints:
    """Indexes of all tensors, layers.2 before layers.10, children of a module together.

    Names of a model are made of few different components: those are ranked once, and names sorted by rank.
    """
    names = [tensor.name for tensor in manifest.tensors]
    text = f".{_END}.".join(names)
    if text.count(_END) != len(names) - 1:  # no names at all, or one with a line break
        return ints(sorted(range(len(names)), key=lambda index: (natural_key(names[index]), names[index])))
    parts = text.split(".")  # one flat list: a list per name costs more in garbage collection than all the rest
    keys_of = {part: natural_key(part) for part in set(parts) - {_END}}
    different = {key: number for number, key in enumerate(sorted(set(keys_of.values())), start=1)}
    rank = {part: different[key] for part, key in keys_of.items()} | {_END: 0}
    ranks = np.fromiter(map(rank.__getitem__, parts), dtype=np.int32, count=len(parts))
    ends = np.flatnonzero(ranks == 0)
    begins = np.concatenate([[0], ends + 1])
    lengths = np.concatenate([ends, [len(parts)]]) - begins
    levels = np.arange(int(lengths.max()))[:, None]
    keys = ranks[np.minimum(begins + levels, len(parts) - 1)]
    return np.lexsort(np.where(levels < lengths, keys, 0)[::-1]).astype(np.int64)
