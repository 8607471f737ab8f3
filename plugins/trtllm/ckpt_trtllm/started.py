"""What the engine wants of a checkpoint: the names, shapes and types of the files that it was started from.

TensorRT-LLM keeps no list of the names that its loaders take, and drops the others in silence; a tensor of another type is cast,
one that is missing leaves what was there. So a checkpoint must be like those files. Only their headers are read, which a start with
dummy weights needs no less.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from ckpt_core.errors import CkptError, EngineStateError
from ckpt_core.layout import Layout, LayoutEntry, Mismatch
from ckpt_core.manifest import Manifest, TensorMeta
from ckpt_core.source import open_checkpoint
from ckpt_trtllm.landing import Landing

_NOT_WEIGHTS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_HEAD = "lm_head."


class Started:
    """Files of one engine.

    Args:
        directory: where they are; None where the engine does not tell.
        tied: the head is the embedding: the engine takes no tensor for it.
    """

    def __init__(self, directory: Path | None, *, tied: bool, rank: int) -> None:
        self._directory = directory
        self._tied = tied
        self._rank = rank

    @cached_property
    def tensors(self) -> Mapping[str, TensorMeta]:
        """What the engine wants, by name.

        Raises:
            EngineStateError: there are no such files, or they cannot be read.
        """
        directory = self._directory
        if directory is None or not any(directory.glob("*.safetensors")):
            raise EngineStateError(
                f"rank {self._rank}: expected *.safetensors where TensorRT-LLM was started from ({directory}), found none; "
                "its loader passes over names that it does not know, so checkpoints are compared with those files: start it "
                "from a directory that has them (load_format='dummy' reads no values)"
            )
        try:
            found = Manifest.from_index(open_checkpoint(directory)).tensors
        except CkptError as error:
            raise EngineStateError(
                f"rank {self._rank}: the files that TensorRT-LLM was started from cannot be compared with: {error}"
            ) from error
        return {tensor.name: tensor for tensor in found if not self.is_spare(tensor.name)}

    def is_spare(self, name: str) -> bool:
        """Whether the engine knows this name and has no use for it."""
        return name.endswith(_NOT_WEIGHTS) or (self._tied and name.startswith(_HEAD))

    def layout(self, manifest: Manifest, landing: Landing) -> Layout:
        """Whole tensors by module, in the order of the files; what does not fit."""
        given = {tensor.name: tensor for tensor in manifest.tensors if not self.is_spare(tensor.name)}
        wanted = self.tensors
        return Layout(
            entries=tuple(LayoutEntry(tensor=name, group=landing.of(name)) for name in wanted if name in given),
            missing=tuple(name for name in wanted if name not in given),
            unknown=tuple(name for name in given if name not in wanted),
            mismatched=tuple(
                Mismatch(tensor=name, expected=kind_of(wanted[name]), got=kind_of(tensor))
                for name, tensor in given.items()
                if name in wanted and kind_of(wanted[name]) != kind_of(tensor)
            ),
        )


def kind_of(tensor: TensorMeta) -> str:
    """Type and shape, as messages have them."""
    return f"{tensor.dtype.torch_name} {list(tensor.shape)}"
