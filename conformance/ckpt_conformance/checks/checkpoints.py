"""The harness's tiny checkpoints: made once a run, read once, and mixed where a check needs that."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ckpt_conformance.levels import ModelKind
from ckpt_core.dtypes import DType
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.source import open_checkpoint

if TYPE_CHECKING:
    from ckpt_conformance.harness import Harness


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk and in memory; `manifest` has no content digests."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    manifest: Manifest


class CheckpointStore:
    """All checkpoints of a run, below one directory."""

    def __init__(self, harness: Harness, directory: Path) -> None:
        self._harness = harness
        self._directory = directory
        self._known: dict[tuple[ModelKind, int], Checkpoint] = {}
        self._made = 0

    def get(self, kind: ModelKind, seed: int) -> Checkpoint:
        """The harness's checkpoint of that kind and seed."""
        key = (kind, seed)
        if key not in self._known:
            place = self._directory / f"{kind.value}-{seed}"
            place.mkdir(parents=True, exist_ok=True)  # a harness that failed may be asked again
            self._known[key] = _read(self._harness.checkpoint(place, kind, seed))
        return self._known[key]

    def manifest_of(self, tensors: Mapping[str, torch.Tensor]) -> Manifest:
        """Manifest of any tensors, without content digests."""
        return Manifest(
            tensors=tuple(
                TensorMeta(
                    name=name, dtype=DType.from_torch_name(str(tensors[name].dtype)), shape=tuple(tensors[name].shape)
                )
                for name in sorted(tensors)
            )
        )

    def new_directory(self, name: str) -> Path:
        """An empty one, of this run."""
        self._made += 1
        place = self._directory / f"{name}-{self._made}"
        place.mkdir(parents=True)
        return place

    def mixture(self, base: Checkpoint, other: Checkpoint, names: Collection[str]) -> Checkpoint:
        """A checkpoint like `base`, but with these tensors from `other`."""
        return self.variant(base, {**base.tensors, **{name: other.tensors[name] for name in names}})

    def variant(self, base: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
        """A checkpoint with the configuration of `base` and any tensors."""
        place = self.new_directory("variant")
        for extra in base.path.iterdir():
            if extra.is_file() and ".safetensors" not in extra.name:
                shutil.copyfile(extra, place / extra.name)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
        return _read(place)


def _read(path: Path) -> Checkpoint:
    index = open_checkpoint(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in index.files:
        tensors.update(load_file(file.path))
    return Checkpoint(path=path, tensors=tensors, manifest=Manifest.from_index(index))
