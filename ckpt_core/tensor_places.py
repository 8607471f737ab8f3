"""Where each content is: tensors of the same bytes, type and shape need one place, whatever their names and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ckpt_core.dtypes import DType
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.source import Extent, SourceFile, SourceIndex

Content = tuple[str, DType, tuple[int, ...]]
Place = tuple[SourceFile, Extent]


def content_of(meta: TensorMeta) -> Content:
    """What a tensor is, without its name."""
    return meta.digest, meta.dtype, meta.shape


def pairs(index: SourceIndex, manifest: Manifest) -> Iterable[tuple[TensorMeta, Extent]]:
    """Each tensor with its extent; both are of one checkpoint, and sorted by name."""
    return zip(manifest.tensors, index.extents, strict=True)


def places_of(versions: Iterable[tuple[SourceIndex, Manifest]], counts: Callable[[str], bool]) -> dict[Content, Place]:
    """The first place of each content in the files, by path, that count."""
    places: dict[Content, Place] = {}
    for index, manifest in versions:
        for meta, extent in pairs(index, manifest):
            file = index.files[extent.file]
            if counts(file.path):
                places.setdefault(content_of(meta), (file, extent))
    return places


def index_from(manifest: Manifest, places: Mapping[Content, Place]) -> SourceIndex:
    """The index of a checkpoint whose tensors have these places."""
    files: dict[SourceFile, int] = {}
    extents = []
    for meta in manifest.tensors:
        file, extent = places[content_of(meta)]
        extents.append(replace(extent, name=meta.name, file=files.setdefault(file, len(files))))
    return SourceIndex(files=tuple(files), extents=tuple(extents))
