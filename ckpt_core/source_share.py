"""The part of a checkpoint that one host reads, as that host sees the files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ckpt_core.source import SourceFile, SourceIndex


def only(index: SourceIndex, names: Collection[str]) -> SourceIndex:
    """The files and extents of these tensors."""
    extents = [extent for extent in index.extents if extent.name in names]
    kept = sorted({extent.file for extent in extents})
    numbers = {file: number for number, file in enumerate(kept)}
    files, regions = len(index.files), len(index.files) + len(index.regions)
    return SourceIndex(
        files=tuple(index.files[file] for file in kept if file < files),
        extents=tuple(replace(extent, file=numbers[extent.file]) for extent in extents),
        regions=tuple(index.regions[file - files] for file in kept if files <= file < regions),
    )


def as_here(index: SourceIndex) -> SourceIndex:
    """The same files as this host sees them: a file system of several hosts numbers files differently on each.

    Raises:
        ManifestError: a file is not there, or has another size or time of change.
    """
    files = []
    for file in index.files:
        here = SourceFile.of(file.path)
        if (here.size_bytes, here.mtime_ns) != (file.size_bytes, file.mtime_ns):
            file.check()  # raises, with what differs
        files.append(here)
    return replace(index, files=tuple(files))
