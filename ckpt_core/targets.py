"""What is updated: engines, and the hosts they are on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_core import cluster as clusters
from ckpt_core import plugins
from ckpt_core.cluster import ClusterKey
from ckpt_core.config import Reading
from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.fleet import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine instance to update.

    Attributes:
        engine: name of its plugin.
        url: base URL of its server; any unique label where `handle` is given.
        handle: the engine object, for an engine in this process.
        plugin: the plugin itself, where it is not installed under that name.
    """

    engine: str
    url: str
    handle: Any = None
    plugin: plugins.EnginePlugin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Engines on other hosts than this one: their agents dial in.

    Attributes:
        key: `controller.json` of `ckpt cluster`.
        hosts: how many hosts take part; an update waits until the agents of all are there.
        reading: which of them read the checkpoint.
    """

    key: ClusterKey
    hosts: int
    reading: Reading = Reading.HERE

    @classmethod
    def load(cls, path: Path, *, hosts: int, reading: Reading = Reading.HERE) -> Cluster:
        """By the controller's file.

        Raises:
            ConfigError: it is no such file, or others may read it.
        """
        return cls(key=clusters.load(path, controller=True), hosts=hosts, reading=reading)


def member_of(target: Target, options: EndpointOptions) -> Member:
    """A target as a fleet has it."""
    endpoint = Endpoint(url=target.url.rstrip("/"), engine=target.engine, options=options, handle=target.handle)
    return Member(endpoint=endpoint, plugin=target.plugin or plugins.load(target.engine))
