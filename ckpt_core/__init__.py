"""Replace the weights of running LLM inference engines in place, exactly and safely.

Names are loaded when they are first used: the planning modules stay importable without what the others need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_core.api import Cluster, Target, Updater, update
    from ckpt_core.config import Reading, Undo, UpdateConfig, VerifyLevel
    from ckpt_core.contract import PauseMode
    from ckpt_core.directory_client import DirectoryClient
    from ckpt_core.errors import CkptError, Outcome, UpdateAborted
    from ckpt_core.joining import Joiner
    from ckpt_core.look_report import EngineLook, LookReport
    from ckpt_core.manifest import Manifest
    from ckpt_core.metrics import UpdateReport
    from ckpt_core.owning import Owner
    from ckpt_core.p2p.peers import Peers
    from ckpt_core.source import open_checkpoint

__all__ = [
    "CkptError",
    "Cluster",
    "DirectoryClient",
    "EngineLook",
    "Joiner",
    "LookReport",
    "Manifest",
    "Outcome",
    "Owner",
    "PauseMode",
    "Peers",
    "Reading",
    "Target",
    "Undo",
    "UpdateAborted",
    "UpdateConfig",
    "UpdateReport",
    "Updater",
    "VerifyLevel",
    "open_checkpoint",
    "update",
]

_HOME = {
    "CkptError": "errors",
    "Cluster": "api",
    "DirectoryClient": "directory_client",
    "EngineLook": "look_report",
    "Joiner": "joining",
    "LookReport": "look_report",
    "Manifest": "manifest",
    "Outcome": "errors",
    "Owner": "owning",
    "PauseMode": "contract",
    "Peers": "p2p.peers",
    "Reading": "config",
    "Target": "api",
    "UpdateAborted": "errors",
    "UpdateConfig": "config",
    "UpdateReport": "metrics",
    "Undo": "config",
    "Updater": "api",
    "VerifyLevel": "config",
    "open_checkpoint": "source",
    "update": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
