"""Plugins with one bug each, around a sound engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ckpt_conformance.reference import plugin
from ckpt_conformance.reference.worker import Worker
from ckpt_core.capability import Capability, Support
from ckpt_core.contract import EngineInfo, LiveTensor, LoadBucket, LoadReport, Update
from ckpt_core.hookspecs import hookimpl
from ckpt_core.layout import Layout
from ckpt_core.manifest import Manifest


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
