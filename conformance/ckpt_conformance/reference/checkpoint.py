"""Reading a checkpoint at start (`--load-format auto`): the plain way, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ckpt_conformance.reference.model import CausalLM
from ckpt_core.errors import CoverageError, ManifestError


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those its index names, else all.

    Raises:
        ManifestError: there is none, or a named one is missing.
    """
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if indexes:
        names = set(json.loads(indexes[0].read_text())["weight_map"].values())
        files = [directory / name for name in sorted(names)]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ManifestError(
            f"{directory}: no safetensors files, or some are missing: {missing}; use --load-format dummy"
        )
    return files


def read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in the checkpoint."""
    for path in checkpoint_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ManifestError(f"{path} cannot be read: {error}") from error


def load_checkpoint(model: CausalLM, directory: Path) -> None:
    """Load a model directory's checkpoint.

    Raises:
        ManifestError: the files cannot be read.
        CoverageError: a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    loaded = model.load_weights(read_tensors(directory))
    missing = sorted(model.table.keys() - loaded)
    if missing:
        raise CoverageError(f"{directory} lacks {len(missing)} tensors that the model needs: {missing[:8]}")
