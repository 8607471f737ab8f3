"""A rank's part of a look: which slices of a checkpoint it holds, and whether they are what they should be. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch

from ckpt_core import plugins, wire
from ckpt_core.channel import Line
from ckpt_core.contract import RecordingTarget
from ckpt_core.errors import WireError
from ckpt_core.failure import describe
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest
from ckpt_core.record.comparable import Comparable, comparable
from ckpt_core.record.recorder import record
from ckpt_core.record.watch import named_tensors
from ckpt_core.verify import fingerprint

_NAMES_TOLD = 16
_NAME_CHARS = 1000  # the answer is a small message, whatever tensors are called
_NOTHING = Comparable(parts=(), homes=(), unchecked={})


def show_held(line: Line, ask: wire.AskHeld, worker: Any, plugin: plugins.EnginePlugin) -> NoReturn:
    """Answer until the look is over.

    Raises:
        AbortRequested: it is: there is no other end.
    """
    found, why = _NOTHING, "only fingerprints are asked for"
    if ask.manifest is not None:
        found, why = _looked_at(ask.manifest, worker, plugin)
    line.send(_held(found, why, ask.manifest, worker, plugin))
    compare = line.expect(wire.CompareHeld)
    live = plugin.hook.ckpt_live(worker=worker)
    line.send(compared(found, compare.digests, fingerprint(live) if live is not None else ""))
    line.expect(wire.Abort)
    raise AssertionError("an abort is raised")


def _looked_at(manifest: Manifest, worker: Any, plugin: plugins.EnginePlugin) -> tuple[Comparable, str]:
    """What can be compared, or why nothing can. Its loader is recorded anew: the engine may have moved parts since."""
    if not plugin.has("ckpt_recording_target"):
        return _NOTHING, "the engine's plugin has no ckpt_recording_target"
    target: RecordingTarget | None = plugin.hook.ckpt_recording_target(worker=worker)
    if target is None:
        return _NOTHING, "the engine's plugin lets nobody record this model's loader"
    try:
        device = next((tensor.device for tensor in named_tensors(target.live).values()), torch.device("cpu"))
        found = comparable(target, record(target, manifest, device=device), manifest)
    except Exception as error:  # noqa: BLE001 engines are many; none of their surprises is a difference
        return _NOTHING, f"the engine's loader could not be recorded: {describe(error)}"
    return found, "" if found.parts else "nothing of the checkpoint lives just as it is in it"


def _held(
    found: Comparable, why: str, manifest: Manifest | None, worker: Any, plugin: plugins.EnginePlugin
) -> wire.HeldSlices:
    fit: Layout | None = None if manifest is None else plugin.hook.ckpt_layout(worker=worker, manifest=manifest)
    return wire.HeldSlices(
        parts=found.parts,
        unchecked=tuple(found.unchecked),
        unchecked_bytes=sum(found.unchecked.values()),
        fit=None if fit is None else replace(fit, entries=()),
        why=why,
    )


def compared(found: Comparable, digests: bytes, print_: str) -> wire.Compared:
    """What lives, against what it should be.

    Raises:
        WireError: there are not as many digests as parts.
    """
    expected: Sequence[int] = np.frombuffer(digests, dtype="<u8").tolist()
    if len(expected) != len(found.parts):
        raise WireError(
            f"expected digests of {len(found.parts)} parts, got {len(expected)}; install the same ckpt-core on both sides"
        )
    parts = [home.part for home in found.homes]
    wrong = [part for part, got, want in zip(parts, found.digests(), expected, strict=True) if got != want]
    names = list(dict.fromkeys(part.item.name[:_NAME_CHARS] for part in wrong))
    differing_bytes = sum(part.size_bytes for part in wrong)
    return wire.Compared(
        equal_bytes=sum(part.size_bytes for part in parts) - differing_bytes,
        differing_bytes=differing_bytes,
        differing=tuple(names[:_NAMES_TOLD]),
        differing_count=len(names),
        fingerprint=print_,
    )
