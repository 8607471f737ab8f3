"""What a check works with: the harness, workers that are closed afterwards, checkpoints, and updates of a worker."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch

from ckpt_conformance.checks.attempt import TENSORS_PER_BUCKET, Arrange, Attempt
from ckpt_conformance.checks.checkpoints import Checkpoint, CheckpointStore
from ckpt_conformance.checks.expect import Bits, same_bits, spoil
from ckpt_conformance.checks.registry import CheckFailed
from ckpt_conformance.harness import Harness, NotOffered
from ckpt_conformance.kept_server import KeptServer
from ckpt_conformance.levels import ModelKind
from ckpt_core.plugins import EnginePlugin

PROMPT = tuple(range(2, 22))
NEW_TOKENS = 6


class Bench:
    """For one check on one kind of model. A context manager: closes every worker.

    Attributes:
        harness, plugin, kind: what is checked.
        hook: the plugin's hooks.
        store, kept: checkpoints, and a server, of the whole run.
        resources: anything else to be closed.
    """

    def __init__(
        self, harness: Harness, plugin: EnginePlugin, kind: ModelKind, store: CheckpointStore, kept: KeptServer
    ) -> None:
        self.harness, self.plugin, self.kind = harness, plugin, kind
        self.hook = plugin.hook
        self.store, self.kept = store, kept
        self.resources = ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    # -- making ----------------------------------------------------------------------------------------------------
    def checkpoint(self, seed: int) -> Checkpoint:
        """The tiny checkpoint with that seed."""
        return self.store.get(self.kind, seed)

    def worker(self) -> Any:
        """A new worker with dummy weights, paused."""
        return self.keep(self.harness.make_worker(self.checkpoint(1).path, self.kind))

    def worker_on(self, seed: int) -> Any:
        """A new worker, updated to a checkpoint."""
        worker = self.worker()
        self.update(worker, seed)
        return worker

    def fresh(self, checkpoint: Checkpoint) -> Any:
        """The oracle: a worker started on a checkpoint."""
        return self.keep(self.harness.fresh(checkpoint.path, self.kind))

    def keep(self, worker: Any) -> Any:
        """Close a worker when the check is over."""
        self.resources.callback(self.harness.close, worker)
        return worker

    # -- updating --------------------------------------------------------------------------------------------------
    def attempt(
        self,
        worker: Any,
        seed: int,
        *,
        tensors_per_bucket: int = TENSORS_PER_BUCKET,
        names: Collection[str] | None = None,
        arrange: Arrange | None = None,
    ) -> Attempt:
        """An update that has not begun."""
        return Attempt(
            self.plugin,
            worker,
            self.checkpoint(seed),
            tensors_per_bucket=tensors_per_bucket,
            names=names,
            arrange=arrange,
        )

    def update(
        self,
        worker: Any,
        seed: int,
        *,
        tensors_per_bucket: int = TENSORS_PER_BUCKET,
        arrange: Arrange | None = None,
    ) -> None:
        """Poison first: fill the live weights with what cannot be right, then run a whole update."""
        spoil(self.harness.live(worker))
        self.attempt(worker, seed, tensors_per_bucket=tensors_per_bucket, arrange=arrange).run()

    # -- looking ---------------------------------------------------------------------------------------------------
    def bits(self, worker: Any) -> dict[str, torch.Tensor]:
        """Copies of the live weights, through the harness's independent view."""
        return {name: tensor.detach().clone() for name, tensor in self.harness.live(worker).items()}

    def addresses(self, worker: Any) -> dict[str, int]:
        """Storage addresses of the live weights."""
        return {name: tensor.data_ptr() for name, tensor in self.harness.live(worker).items()}

    def rank(self, worker: Any) -> str:
        """The rank as messages name it."""
        info = self.hook.ckpt_identify(worker=worker)
        return f"{info.rank} of {info.world_size}"

    def expect_bits(self, worker: Any, expected: Bits, what: str) -> None:
        """Raise CheckFailed where the live weights are not these, bit by bit."""
        same_bits(expected, self.harness.live(worker), rank=self.rank(worker), what=what)

    def expect_fresh(self, worker: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckFailed where the live weights are not those of a fresh start on that checkpoint."""
        self.expect_bits(worker, self.harness.live(self.fresh(checkpoint)), "a fresh start on the same checkpoint")

    def tokens(self, worker: Any) -> list[int]:
        """Greedy tokens for a fixed prompt."""
        return self.harness.generate(worker, PROMPT, NEW_TOKENS)

    def silent(self, worker: Any) -> bool:
        """Whether the worker refuses to produce tokens, even after somebody tried to resume it."""
        for call in (self.harness.serve, self.tokens):
            refused = _refuses(call, worker)
        return refused

    def expect_silent(self, worker: Any, why: str) -> None:
        """Raise CheckFailed where the worker produces tokens."""
        if not self.silent(worker):
            raise CheckFailed(expected=f"no token: {why}", got="tokens", rank=self.rank(worker))


def _refuses(call: Callable[[Any], Any], worker: Any) -> bool:
    try:
        call(worker)
    except NotOffered:
        raise
    except Exception:  # noqa: BLE001 how an engine refuses is its own matter
        return True
    return False
