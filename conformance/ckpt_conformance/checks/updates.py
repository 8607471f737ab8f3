"""Real updates of workers in this process, or of servers: small rings, short deadlines, and a memory of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed
from ckpt_core.api import Target, Updater
from ckpt_core.config import Environment, Undo, UpdateConfig
from ckpt_core.errors import CkptError
from ckpt_core.history import pool_directory
from ckpt_core.session import OnProgress

CONFIG = UpdateConfig(
    ring_bytes=1 << 20,
    bucket_bytes=1 << 16,
    attach_timeout_s=30.0,
    transfer_timeout_s=30.0,
    silence_timeout_s=20.0,
    commit_timeout_s=20.0,
    undo=Undo.NONE,
)


def updater_of(bench: Bench, workers: Sequence[Any], **options: Any) -> Updater:
    """For workers in this process; see `updater`."""
    return updater(bench, [bench.harness.target(worker) for worker in workers], **options)


def updater(
    bench: Bench, targets: Sequence[Target], *, on_progress: OnProgress | None = None, **changes: Any
) -> Updater:
    """For any engines.

    Args:
        changes: of CONFIG.
    """
    state = bench.store.new_directory("state")
    memory = pool_directory(Environment.read().memory_root, state)
    bench.resources.callback(shutil.rmtree, memory, ignore_errors=True)
    # what its user remembers of versions and labels is none of a check's business, and the other way round
    with patch.dict(os.environ, {"CKPT_STATE_DIR": str(state)}):
        return Updater(targets, config=replace(CONFIG, **changes), on_progress=on_progress)


def failure_of(updating: Updater, checkpoint: Any, *, version: str = "") -> CkptError:
    """The error of an update that must fail.

    Raises:
        CheckFailed: it did not.
    """
    try:
        updating.update(checkpoint, version=version)
    except CkptError as error:
        return error
    raise CheckFailed(expected="the update fails", got="it was committed")
