"""Plugins with one bug each, around a sound engine."""

from __future__ import annotations

import copy
import itertools
import os
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from msgspec import structs

from ckpt_conformance.reference import plugin
from ckpt_conformance.reference.model import CausalLM
from ckpt_conformance.reference.worker import Worker
from ckpt_core.capability import Capability, Support
from ckpt_core.contract import EngineInfo, LiveTensor, LoadBucket, LoadReport, RankInfo, RecordingTarget, Update
from ckpt_core.hookspecs import hookimpl
from ckpt_core.layout import Layout, Mismatch
from ckpt_core.manifest import Manifest

_TABLE = 16
_turns = itertools.count()
_twins: weakref.WeakKeyDictionary[Worker, CausalLM] = weakref.WeakKeyDictionary()


def variant(**hooks: Callable[..., Any]) -> SimpleNamespace:
    """The reference plugin with some hooks replaced."""
    own = {name: value for name, value in vars(plugin).items() if name.startswith("ckpt_")}
    return SimpleNamespace(**{**own, **hooks})


@hookimpl
def unnamed_unknowns(worker: Worker, manifest: Manifest) -> Layout:
    """A layout that leaves unknown tensors out without a word."""
    return replace(plugin.ckpt_layout(worker, manifest), unknown=())


@hookimpl
def unnamed_missing(worker: Worker, manifest: Manifest) -> Layout:
    """A layout that does not look for what is missing."""
    return replace(plugin.ckpt_layout(worker, manifest), missing=())


@hookimpl
def moving_layout(worker: Worker, manifest: Manifest) -> Layout:
    """A layout found by a trial run, after which the norm is somewhere else."""
    norm = worker.model.model.norm.tensor("weight")
    norm.data = norm.data.clone()
    return plugin.ckpt_layout(worker, manifest)


@hookimpl
def forgetful_report(worker: Worker, update: Update, bucket: LoadBucket) -> LoadReport:
    """A report that leaves out what went into a fused parameter."""
    report = plugin.ckpt_load(worker, update, bucket)
    return replace(report, loaded=tuple(name for name in report.loaded if ".k_proj." not in name))


@hookimpl
def live_copies(worker: Worker) -> Mapping[str, LiveTensor]:
    """Copies instead of the storage."""
    live = plugin.ckpt_live(worker)
    return {name: replace(item, tensor=item.tensor.clone()) for name, item in live.items()}


@hookimpl
def unexplained_info() -> EngineInfo:
    """A capability without a level."""
    info = plugin.ckpt_engine_info()
    capabilities: dict[Capability, Support] = dict(info.capabilities)
    del capabilities[Capability.LORA]
    return replace(info, capabilities=capabilities)


@hookimpl
def changing_info() -> EngineInfo:
    """Another version at every load."""
    return replace(plugin.ckpt_engine_info(), plugin_version=uuid.uuid4().hex)


@hookimpl
def new_identity(worker: Worker) -> RankInfo:
    """An instance id made anew at each call."""
    return replace(plugin.ckpt_identify(worker), instance_id=uuid.uuid4().hex)


@hookimpl
def rank_of_the_launcher(worker: Worker) -> RankInfo:
    """Rank 0 is taken for no rank, and that of the environment for it."""
    info = plugin.ckpt_identify(worker)
    return replace(info, rank=info.rank or int(os.environ.get("RANK", "0")))


@hookimpl
def padded_shapes(worker: Worker, manifest: Manifest) -> Layout:
    """The checkpoint's vocabulary is compared with the parameter's padded one."""
    layout = plugin.ckpt_layout(worker, manifest)
    (vocab, hidden), parameter = worker.model.table["model.embed_tokens.weight"].shape, worker.model.model.embed_tokens
    wrong = Mismatch(
        tensor="model.embed_tokens.weight",
        expected=f"[{parameter.rows * worker.tp_size}, {hidden}]",
        got=f"[{vocab}, {hidden}]",
    )
    return replace(layout, mismatched=(*layout.mismatched, wrong))


@hookimpl
def impure_layout(worker: Worker, manifest: Manifest) -> Layout:
    """The order of groups is that of a set of objects: another one each time."""
    layout = plugin.ckpt_layout(worker, manifest)
    turned = next(_turns) % len(layout.entries)
    return replace(layout, entries=(*layout.entries[turned:], *layout.entries[:turned]))


@hookimpl
def unnamed_mismatches(worker: Worker, manifest: Manifest) -> Layout:
    """A layout that compares names only."""
    return replace(plugin.ckpt_layout(worker, manifest), mismatched=())


@hookimpl
def false_cut(worker: Worker, manifest: Manifest) -> Layout:
    """A layout that says tensors may come in parts, of a plugin that does not look at them."""
    layout = plugin.ckpt_layout(worker, manifest)
    return replace(layout, entries=tuple(structs.replace(entry, cut=True) for entry in layout.entries))


@hookimpl
def sixteen_buckets(worker: Worker, update: Update, bucket: LoadBucket) -> LoadReport:
    """What is behind the sixteenth bucket finds no room in a table, and is forgotten."""
    if bucket.index < _TABLE:
        return plugin.ckpt_load(worker, update, bucket)
    names = tuple(item.name for item in bucket.tensors)
    worker._arrived.update(names)
    return LoadReport(loaded=names)


def live_as_first_seen() -> Callable[..., Mapping[str, LiveTensor]]:
    """ckpt_live that keeps what it showed first, for any worker."""
    seen: dict[int, Mapping[str, LiveTensor]] = {}

    @hookimpl
    def ckpt_live(worker: Worker) -> Mapping[str, LiveTensor]:
        key = len(worker.live())
        if key not in seen:
            seen[key] = live_copies(worker)
        return seen[key]

    return ckpt_live


@hookimpl
def recorded_twin(worker: Worker) -> RecordingTarget:
    """The recording knows a copy of the model that serves; what is seen of it from outside is never what serves."""
    target = plugin.ckpt_recording_target(worker)
    if worker not in _twins:
        _twins[worker] = copy.deepcopy(worker.model)
    return replace(target, live=_twins[worker])
