"""What is known of one engine rank's loader, kept between its updates: the recording, the proof, the replay."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from ckpt_core.contract import LoadBucket, LoadTensor, RecordingTarget
from ckpt_core.incoming import TakenPart
from ckpt_core.layout import Layout, LayoutEntry
from ckpt_core.manifest import Manifest
from ckpt_core.plugins import EnginePlugin
from ckpt_core.record.components import components
from ckpt_core.record.live import LiveHomes
from ckpt_core.record.proof import Proof, Verdict
from ckpt_core.record.recorder import record
from ckpt_core.record.recording import Recording
from ckpt_core.record.replay import Replay
from ckpt_core.record.thin import thin
from ckpt_core.record.watch import named_tensors, sums_of_others
from ckpt_core.verify import Verifier

_log = logging.getLogger(__name__)
_MOST_DROPS = 3  # a replay that never lasts costs a watched update each time
_NONE: frozenset[str] = frozenset()
Found = TypeVar("Found")


class RecordedModel:
    """Of one worker. Every update either goes through the engine's loader and is watched, or is replayed as far as proved.

    Attributes:
        recording: of the last structure; None before the first.
        verdict: of the last watched update.
        wrote: in this update, live parameters past the plugin.
        lost: something went wrong in learning: the next layout is to be asked for again.
    """

    def __init__(self, plugin: EnginePlugin, worker: Any) -> None:
        self._hook = plugin.hook
        self._worker = weakref.ref(worker)  # this is kept as long as the worker lives, and not the other way round
        self._structure = ""
        self._proof: Proof | None = None
        self._replay: Replay | None = None
        self._conditions: _Conditions | None = None
        self._homes = LiveHomes()
        self._homes_of: Replay | None = None
        self._active = True
        self._thin = False
        self._watched = False
        self._dropped = 0
        self.wrote = False
        self.lost = False
        self.recording: Recording | None = None
        self.verdict: Verdict | None = None

    @property
    def roots(self) -> frozenset[str]:
        """Checkpoint tensors that this update replays: the same object as long as these are the same."""
        return _NONE if self._replay is None or not self._active else self._replay.roots

    @property
    def recorded_share(self) -> float:
        """Of the bytes that the loader takes: how many are pure copies."""
        return 0.0 if self.recording is None else self.recording.recorded_share

    def still_holds(self) -> bool:
        """Whether the engine is as it was when the replay was proved. Drops the replay where it is not."""
        if self._replay is None:
            return True
        if self._guarded(self._holds, "looked at"):
            return True
        self._drop()
        return False

    def _drop(self) -> None:
        self._dropped += 1
        often = ", for good: this is the third time" if self._dropped >= _MOST_DROPS else ""
        _log.info("the engine changed since its loader was recorded: it loads by itself again%s", often)
        self.forget()

    def _holds(self) -> bool:
        target, replay, conditions = self._target(), self._replay, self._conditions
        if target is None or replay is None or conditions is None:
            return False
        return conditions.hold(target) and replay.holds_for(named_tensors(target.live))

    def forget(self) -> None:
        """The next update starts anew."""
        self._structure, self._proof, self._replay, self.recording = "", None, None, None
        self._watched = False

    def layout(self, manifest: Manifest, plain: Layout, *, replay: bool) -> Layout:
        """What is needed once loaders are known: parts of what is replayed, nothing of what the loader does not want.

        Args:
            plain: what the plugin asks for.
            replay: else the loader is used, and not watched.
        """
        self._active, self.lost = replay, False
        if replay:
            self._guarded(lambda: self._learn(manifest), "recorded")
        if not replay or self._replay is None or self.recording is None:
            return plain
        return refined(plain, self.recording, self._replay.roots)

    def begin(self) -> None:
        """Right before the engine's begin hook."""
        self.wrote = False
        # not as soon as there is another replay: what an update replayed is compared after it was judged
        if self._homes_of is not self._replay:
            self._homes, self._homes_of = LiveHomes(), self._replay
        self._homes.begin()
        self._watched = self._active and self._proof is not None and self._proof.worth_a_try
        if self._watched and self._proof is not None:
            self._watching(self._proof.begin)

    def load(self, index: int, items: tuple[LoadTensor, ...]) -> int:
        """Replay these pieces of bucket `index`. Bytes read."""
        assert self._replay is not None
        if not self.wrote:
            self.wrote = True
            self._replay.fill()
        return self._replay.load(index, items)

    def at_home(self, index: int, items: tuple[LoadTensor, ...], parts: Sequence[TakenPart]) -> frozenset[int]:
        """Numbers of the parts of bucket `index` that can be compared where the replay puts them."""
        assert self._replay is not None
        return self._homes.add(index, items, parts, self._replay.pulls(index, items))

    def check_live(self, verifier: Verifier) -> None:
        """Compare, after the finish hook, what was replayed and can be compared where it lives.

        Raises:
            VerificationError: a digest differs.
        """
        self._homes.check(verifier)

    def for_loader(self, bucket: LoadBucket) -> LoadBucket:
        """The bucket as the engine's loader gets it."""
        if not self._thin or not self._active or self.recording is None:
            return bucket
        recording = self.recording
        return LoadBucket(index=bucket.index, tensors=tuple(thin(item, recording) for item in bucket.tensors))

    def arrived(self, items: Sequence[LoadTensor]) -> None:
        """These are about to be given to the engine's loader."""
        for item in items:
            if self._watched and self._proof is not None:
                self._watching(partial(self._proof.arrived, item))

    def finish(self) -> bool:
        """Right after the engine's finish hook. Whether there is something to replay from now on that was not before."""
        return bool(self._watching(self._judge))

    def _judge(self) -> bool:
        if not self._watched or self._proof is None or self.recording is None:
            return False
        self._watched = False
        self.verdict = self._proof.finish()
        proved = self.verdict.proved
        roots: frozenset[str] = frozenset().union(*(component.roots for component in proved))
        for name, why in list(self.verdict.why_not.items())[:4]:
            _log.info("not replayed: %s (%s)", name, why)
        target = self._target()
        before = _NONE if self._replay is None else self._replay.roots
        if roots == before or target is None:
            return False
        if not roots >= before or (before and not self._holds()):
            self._drop()
            self.lost = True
            return False
        named = named_tensors(target.live)
        parameters = {name: named[name] for component in proved for name in component.parameters}
        self._replay, self._conditions = Replay(self.recording, parameters, roots), _Conditions(target, self.recording)
        return True

    def _guarded(self, look: Callable[[], Found], what: str) -> Found | None:
        """Learning is a bonus: where it fails, for any reason, the loader loads as ever."""
        try:
            return look()
        except Exception:  # noqa: BLE001 engines are many, and none of their surprises may cost an update
            _log.warning("the engine could not be %s; its loader takes whole tensors", what, exc_info=True)
            self.forget()
            self.lost = True
            return None

    def _watching(self, look: Callable[[], Found]) -> Found | None:
        """As guarded; but what this update replays was agreed upon, and stays: only nothing more is learned."""
        if self._replay is None:
            return self._guarded(look, "watched")
        try:
            return look()
        except Exception:  # noqa: BLE001 as above
            _log.warning("the engine could not be watched; what its loader takes stays so", exc_info=True)
            self._proof, self._watched = None, False
            return None

    def _learn(self, manifest: Manifest) -> None:
        target = self._target() if self._dropped < _MOST_DROPS else None
        if target is None:
            self.forget()
        elif self._structure != manifest.structure_digest:
            self._record(target, manifest)

    def _record(self, target: RecordingTarget, manifest: Manifest) -> None:
        self.forget()
        device = next((tensor.device for tensor in named_tensors(target.live).values()), torch.device("cpu"))
        self.recording = record(target, manifest, device=device)
        self._structure, self._thin = manifest.structure_digest, target.thin
        sizes = {name: tensor.numel() for name, tensor in named_tensors(target.live).items()}
        found = components(self.recording, sizes, target.excluded)
        self._proof = Proof(recording=self.recording, components=found, model=target.live, ignored=target.caches)

    def _target(self) -> RecordingTarget | None:
        target: RecordingTarget | None = self._hook.ckpt_recording_target(worker=self._worker())
        return target


def refined(plain: Layout, recording: Recording, replayed: Collection[str]) -> Layout:
    """A layout with the recorded slices of the tensors that are replayed; the others stay as they are.

    Also those that the loader was not seen to take: that a recording lost sight of them proves nothing.
    """
    entries: list[LayoutEntry] = []
    for entry in plain.entries:
        if entry.tensor in replayed:
            boxes = recording.boxes_of(entry.tensor)
            entries += [LayoutEntry(tensor=entry.tensor, box=box, group=entry.group, cut=True) for box in boxes]
        else:
            entries.append(entry)
    return replace(plain, entries=tuple(entries))


class _Conditions:
    """What must stay as it is for a replay to be right: placement, and every table of whole numbers (expert maps).

    Weights of whole numbers, which updates write, are not among them.
    """

    def __init__(self, target: RecordingTarget, recording: Recording) -> None:
        self._written = recording.written
        self._before = self._now(target)

    def hold(self, target: RecordingTarget) -> bool:
        """Whether they are as they were; a table that came or went counts."""
        return self._now(target) == self._before

    def _now(self, target: RecordingTarget) -> tuple[object, ...]:
        tables = sums_of_others(target.live, self._written, target.caches, wanted=_is_table)
        return target.placement, dict(target.excluded), tables


def _is_table(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()
