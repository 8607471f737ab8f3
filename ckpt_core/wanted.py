"""What one rank wants of a checkpoint: its layout, worked out as far as that goes before there is a plan."""

from __future__ import annotations

from ckpt_core.layout import Box, Layout, box_of
from ckpt_core.manifest import Manifest


class Wanted:
    """A layout against a manifest.

    Attributes:
        manifest: the checkpoint.
        boxes: the slices, by index in the manifest; None for all of a tensor.
        names: of the tensors.

    Raises:
        ManifestError: the layout names a tensor that the checkpoint does not have.
        CoverageError: a slice is not inside its tensor.
    """

    def __init__(self, manifest: Manifest, layout: Layout) -> None:
        self.manifest = manifest
        self.boxes: dict[int, list[Box | None]] = {}
        inside: set[tuple[Box | None, int]] = {(None, kind) for kind in manifest.kinds}
        for entry in layout.entries:
            index = manifest.index_of(entry.tensor)
            key = (entry.box, manifest.kinds[index])
            if key not in inside:
                # an empty slice of a tensor with elements is no need at all, also where others need the tensor
                if not box_of(entry, manifest.tensors[index].shape).size and manifest.sizes_bytes[index]:
                    continue
                inside.add(key)
            self.boxes.setdefault(index, []).append(entry.box)
        self.names = frozenset(manifest.tensors[index].name for index in self.boxes)
