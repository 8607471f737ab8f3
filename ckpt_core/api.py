"""The main job as a Python call: put the weights of a checkpoint into running engines."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckpt_core import cluster as clusters
from ckpt_core import limits as machine_limits
from ckpt_core import plugins
from ckpt_core.agent_peers import AgentPeers
from ckpt_core.agents import AgentGroup
from ckpt_core.agreement import KnownPlan
from ckpt_core.channel import Hub
from ckpt_core.cluster import ClusterKey
from ckpt_core.cluster_agents import ClusterAgents
from ckpt_core.config import Environment, Reading, UpdateConfig, VerifyLevel
from ckpt_core.conversation import Conversation
from ckpt_core.cost import predict
from ckpt_core.device_source import export_tensors
from ckpt_core.endpoint import Endpoint, EndpointOptions
from ckpt_core.fleet import EndpointLocks, Fleet, Member
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.flows import predict_fleet
from ckpt_core.metrics import Stage, UpdateReport
from ckpt_core.session import OnProgress, Session
from ckpt_core.shm import private_directory, remove_directory
from ckpt_core.source import SourceIndex, open_checkpoint, restage_tensors, stage_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    Checkpoint = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, torch.Tensor]

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 60.0
_AGENT_SILENCE_S = 24 * 3600.0  # between updates nobody talks; agents notice their parent's end by their standard input


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


class Updater:
    """Keeps agents, sockets and HTTP clients over several updates of the same engines. A context manager.

    Args:
        targets: the engines; they move together or not at all.
        config: options, see UpdateConfig.
        endpoint_options: how to talk to the engines' servers.
        on_progress: told stage, done and total bytes, now and then.
        cluster: the hosts, where engines are on others than this one.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        config: UpdateConfig | None = None,
        endpoint_options: EndpointOptions | None = None,
        on_progress: OnProgress | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self._config = _config_for(cluster, config or UpdateConfig())
        self._cluster = cluster
        self._on_progress = on_progress or _ignore
        self._environment = Environment.read()
        options = endpoint_options or EndpointOptions(
            bearer_token=self._environment.bearer_token, pause_timeout_s=self._config.pause_timeout_s
        )
        self._fleet = Fleet(members=[_member(target, options) for target in targets])
        self._exit = ExitStack()
        self._exit.callback(self._fleet.close)
        self._agents: AgentGroup | ClusterAgents | None = None
        self._known_plan: KnownPlan | None = None
        self._staged: SourceIndex | None = None

    def __enter__(self) -> Updater:
        if self._cluster is None:
            self._hub = Hub(self._sockets)
            self._memory  # noqa: B018 made now, so that it goes last
        else:
            self._hub = Hub(cluster=self._cluster.key)
        self._exit.callback(self._hub.close)
        self._talk = Conversation(self._hub, ping_every_s=self._config.silence_timeout_s / 5)
        self._exit.callback(self._talk.close)
        self._exit.callback(self._stop_agents)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @cached_property
    def _sockets(self) -> Path:
        return self._directory(self._environment.socket_root)

    @cached_property
    def _memory(self) -> Path:
        return self._directory(self._environment.memory_root)

    def _directory(self, root: Path) -> Path:
        """Made when it is needed: with agents of a cluster nobody removes it if this process is killed."""
        made = private_directory(root, "ckpt-")
        self._exit.callback(remove_directory, made)
        return made

    @property
    def agent_pids(self) -> tuple[int, ...]:
        """Process ids of the agents that run now."""
        return self._agents.pids if isinstance(self._agents, AgentGroup) else ()

    def update(self, checkpoint: Checkpoint, *, version: str = "") -> UpdateReport:
        """Move all engines to a checkpoint.

        Args:
            checkpoint: a safetensors directory, file or list of files, or named tensors.
            version: label to publish it under; by default the start of its content digest.

        Raises:
            CkptError: bad input, found before anything was touched.
            UpdateAborted: anything later; `.outcome` says what the engines hold now.
        """
        with EndpointLocks(self._environment.socket_root) as locks, self._index(checkpoint) as index:
            for member in self._fleet.members:
                locks.take(member.endpoint.url)
            self._fleet.check()
            self._fleet.check_options(self._config)
            session = Session(
                index,
                version=version,
                fleet=self._fleet,
                agents=self._running_agents(),
                conversation=self._talk,
                config=self._config,
                known_plan=self._known_plan,
                on_progress=self._on_progress,
            )
            try:
                report = session.run()
            except BaseException:
                self._stop_agents()  # one of them may be what failed; the next update starts with new ones
                raise
            self._known_plan = session.known_plan
            return self._with_prediction(report, session.plan)

    def _with_prediction(self, report: UpdateReport, plan: FleetPlan | None) -> UpdateReport:
        """What it should have taken on this machine, or these; worked out when the engines serve again."""
        if plan is None:
            return report
        if plan.routed is not None:
            return replace(report, predicted=predict_fleet(plan, self._limits)) if plan.rates_known else report
        return report if self._limits is None else replace(report, predicted=predict(plan.plans[0], self._limits))

    @cached_property
    def _limits(self) -> machine_limits.Limits | None:
        return machine_limits.load(self._environment.cache_root, machine_limits.identify())

    def _running_agents(self) -> AgentPeers:
        return self._local_agents() if self._cluster is None else self._cluster_agents(self._cluster)

    def _cluster_agents(self, cluster: Cluster) -> ClusterAgents:
        if isinstance(self._agents, ClusterAgents):
            if self._agents.alive:
                return self._agents
            self._stop_agents()
        self._agents = agents = ClusterAgents(self._talk, token=cluster.key.token, reading=cluster.reading)
        try:
            agents.join(cluster.hosts, _JOIN_TIMEOUT_S)
        except BaseException:
            self._stop_agents()
            raise
        return agents

    def _local_agents(self) -> AgentGroup:
        wanted = self._fleet.devices()
        running = self._agents if isinstance(self._agents, AgentGroup) else None
        if running is not None and (running.devices != wanted or not running.alive):
            self._stop_agents()
            running = None
        if running is None:
            token = secrets.token_hex(16)
            self._agents = running = AgentGroup(
                wanted,
                conversation=self._talk,
                directory=self._memory,
                token=token,
                silence_timeout_s=_AGENT_SILENCE_S,
                orphans=(self._sockets,),
                log_level=self._environment.log_level,
            )
            try:
                running.join(_JOIN_TIMEOUT_S)
            except BaseException:
                self._stop_agents()
                raise
        return running

    def _stop_agents(self) -> None:
        agents, self._agents, self._known_plan = self._agents, None, None
        self._talk.watches.clear()
        if agents is not None:
            agents.stop()

    @contextmanager
    def _index(self, checkpoint: Checkpoint) -> Iterator[SourceIndex]:
        if not isinstance(checkpoint, Mapping):
            yield open_checkpoint(checkpoint)
            return
        on_gpu = checkpoint and all(getattr(tensor, "is_cuda", False) for tensor in checkpoint.values())
        if on_gpu and self._cluster is None:  # parts of what is on a GPU cannot be packed for other hosts
            exported = export_tensors(checkpoint)
            if exported is not None:
                yield exported.index
                return
            _log.warning("this process's GPU memory cannot be exported (allocator settings); going over host memory")
        yield self._stage(checkpoint)

    def _stage(self, tensors: Mapping[str, torch.Tensor]) -> SourceIndex:
        """Tensors in the host pool: over those of the last update where names, dtypes and shapes are the same."""
        if self._staged is not None:
            again = restage_tensors(tensors, self._staged)
            if again is None:
                remove_directory(Path(self._staged.files[0].path).parent)
            self._staged = again
        if self._staged is None:
            self._staged = stage_tensors(tensors, private_directory(self._memory, "pool-"))
        return self._staged


def update(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    *,
    version: str = "",
    config: UpdateConfig | None = None,
    endpoint_options: EndpointOptions | None = None,
    on_progress: OnProgress | None = None,
    cluster: Cluster | None = None,
) -> UpdateReport:
    """One update with agents of its own, or those of a cluster; see `Updater`."""
    with Updater(
        targets, config=config, endpoint_options=endpoint_options, on_progress=on_progress, cluster=cluster
    ) as updater:
        return updater.update(checkpoint, version=version)


def _config_for(cluster: Cluster | None, config: UpdateConfig) -> UpdateConfig:
    """Between hosts every bucket is digested on its way: to digest whole tensors, too, each rank would have to get them whole."""
    if cluster is None or config.verify is not VerifyLevel.AUTO:
        return config
    return replace(config, verify=VerifyLevel.NONE)


def _member(target: Target, options: EndpointOptions) -> Member:
    endpoint = Endpoint(url=target.url.rstrip("/"), engine=target.engine, options=options, handle=target.handle)
    return Member(endpoint=endpoint, plugin=target.plugin or plugins.load(target.engine))


def _ignore(_stage: Stage, _done: int, _total: int) -> None:
    """Progress that nobody follows."""
