"""The layout of a rank: whole tensors, grouped by the vLLM module they land in, and how checkpoint and model do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from ckpt_core.errors import CkptError
from ckpt_core.layout import Layout, LayoutEntry, Mismatch, whole_layout
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.source import open_checkpoint
from ckpt_vllm.expected import ExpectedCheckpoint, ExpectedTensor, is_ignorable

_log = logging.getLogger("vllm.ckpt")
Rename = Callable[[str], str | None]


def layout_of(
    manifest: Manifest, expected: ExpectedCheckpoint, rename: Rename, elsewhere: Callable[[str], bool]
) -> Layout:
    """Compare a checkpoint with what a model wants.

    Args:
        rename: the model's own renaming; None for names that it drops.
        elsewhere: whether a name belongs to another pipeline stage.
    """
    entries, unknown, mismatched, arrived, whole_experts = [], [], [], set(), set()
    for tensor in manifest.tensors:
        name = rename(tensor.name)
        if name is None or name in expected.aliases or is_ignorable(name):
            continue
        if name in expected.fused_experts:
            whole_experts.add(expected.fused_experts[name])
            entries.append(LayoutEntry(tensor=tensor.name, group=expected.fused_experts[name]))
            continue
        wanted = expected.tensors.get(name)
        if wanted is None:
            if not elsewhere(name):
                unknown.append(tensor.name)
            continue
        arrived.add(name)
        entries.append(LayoutEntry(tensor=tensor.name, group=wanted.group))
        if misfit := _misfit(tensor, wanted):
            mismatched.append(misfit)
    missing = [
        name
        for name, wanted in expected.tensors.items()
        if wanted.required and name not in arrived and wanted.group not in whole_experts
    ]
    return Layout(
        entries=tuple(entries), missing=tuple(missing), unknown=tuple(sorted(unknown)), mismatched=tuple(mismatched)
    )


def started_from(directory: str) -> Manifest | None:
    """The files that the engine was started from, where it was started from any."""
    if not Path(directory).is_dir() or not any(Path(directory).glob("*.safetensors")):
        return None
    try:
        return Manifest.from_index(open_checkpoint(directory))
    except CkptError as error:
        _log.info("the files that vLLM was started from cannot be compared: %s", error)
        return None


def fits(layout: Layout) -> bool:
    """Whether nothing is missing, unknown or of another shape."""
    return not (layout.missing or layout.unknown or layout.mismatched)


def layout_like(manifest: Manifest, started: Manifest, aliases: Collection[str]) -> Layout:
    """Compare a checkpoint with the files that the engine was started from: for a model whose renaming the plugin does not know.

    Args:
        aliases: names that share another's storage: not needed.
    """
    wanted = {tensor.name: tensor for tensor in started.tensors if not _is_spare(tensor.name, aliases)}
    given = {tensor.name: tensor for tensor in manifest.tensors if not _is_spare(tensor.name, aliases)}
    return Layout(
        entries=tuple(entry for entry in whole_layout(manifest).entries if entry.tensor in wanted),
        missing=tuple(name for name in wanted if name not in given),
        unknown=tuple(name for name in given if name not in wanted),
        mismatched=tuple(
            Mismatch(tensor=name, expected=_kind_of(wanted[name]), got=_kind_of(tensor))
            for name, tensor in given.items()
            if name in wanted and _kind_of(wanted[name]) != _kind_of(tensor)
        ),
    )


def _is_spare(name: str, aliases: Collection[str]) -> bool:
    return name in aliases or is_ignorable(name)


def _kind_of(tensor: TensorMeta) -> str:
    return f"{tensor.dtype.torch_name} {list(tensor.shape)}"


def unchecked(manifest: Manifest) -> Layout:
    """Every tensor, whole: the engine's own loader must judge."""
    return whole_layout(manifest)


def _misfit(tensor: TensorMeta, wanted: ExpectedTensor) -> Mismatch | None:
    dtype = tensor.dtype.torch_name
    if (wanted.shape is None or wanted.shape == tensor.shape) and (wanted.dtype is None or wanted.dtype == dtype):
        return None
    shape = "any shape" if wanted.shape is None else str(list(wanted.shape))
    return Mismatch(
        tensor=tensor.name, expected=f"{wanted.dtype or 'any type'} {shape}", got=f"{dtype} {list(tensor.shape)}"
    )
