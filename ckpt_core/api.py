"""The main job as a Python call: put the weights of a checkpoint into running engines."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_core import limits as machine_limits
from ckpt_core.agent_peers import AgentPeers
from ckpt_core.agents import AgentGroup
from ckpt_core.agreement import KnownPlan
from ckpt_core.channel import Hub
from ckpt_core.cluster_agents import ClusterAgents
from ckpt_core.config import Environment, Undo, UpdateConfig
from ckpt_core.conversation import Conversation
from ckpt_core.device_source import export_tensors
from ckpt_core.endpoint import EndpointOptions
from ckpt_core.errors import CkptError, Outcome, UpdateAborted
from ckpt_core.expected import Expected
from ckpt_core.fleet import EndpointLocks, Fleet
from ckpt_core.going_back import go_back
from ckpt_core.history import History
from ckpt_core.insist import insist
from ckpt_core.journal import note
from ckpt_core.look_report import LookReport
from ckpt_core.looks import Looks
from ckpt_core.metrics import UpdateReport
from ckpt_core.p2p.peers import Peers
from ckpt_core.prediction import prediction_of
from ckpt_core.recovery import recover
from ckpt_core.session import OnProgress, Session
from ckpt_core.shm import private_directory, remove_directory
from ckpt_core.source import SourceIndex, open_checkpoint
from ckpt_core.staged import StagedTensors
from ckpt_core.states import SessionState
from ckpt_core.store_records import EngineRecord
from ckpt_core.targets import Cluster, Target, member_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    Checkpoint = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, torch.Tensor] | Peers

__all__ = ["Cluster", "Target", "Updater", "update"]

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 60.0
_AGENT_SILENCE_S = 24 * 3600.0  # between updates nobody talks; agents notice their parent's end by their standard input


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
        self._config = config or UpdateConfig()
        self._cluster = cluster
        self._on_progress = on_progress or (lambda _stage, _done, _total: None)
        self._environment = Environment.read()
        options = endpoint_options or EndpointOptions.of(
            self._environment, pause_timeout_s=self._config.pause_timeout_s
        )
        self._fleet = Fleet(members=[member_of(target, options) for target in targets])
        self._exit = ExitStack()
        self._exit.callback(self._fleet.close)
        self._agents: AgentGroup | ClusterAgents | None = None
        self._known_plan: KnownPlan | None = None
        self._staged = StagedTensors(self._config.keep_versions)

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
    def history(self) -> History:
        """What is remembered of versions, engines and updates; where there is no place for it, as long as this Updater lives."""
        known = self._environment.state_root is not None
        made = History.of(self._environment, None if known else self._directory(self._environment.socket_root))
        self._exit.callback(made.close)
        return made

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
            checkpoint: a safetensors directory, file or list of files, named tensors, or peers to read it from.
            version: label to publish it under; by default that of the peers, or the start of its content digest.

        Raises:
            CkptError: bad input, found before anything was touched.
            UpdateAborted: anything later; `.outcome` says what the engines hold now.
        """
        with self._index(checkpoint) as index, self._locked():
            self._fleet.check_options(self._config)
            return self._move(self._fleet, index, version, self._config.for_source(remote=index.remote is not None))

    def rollback(self, version: str = "") -> UpdateReport:
        """Move all engines back to a version that is still warm.

        Args:
            version: label, digest, or the beginning of one; by default the one that was used last and that no engine runs.

        Raises:
            ConfigError: there is no such version, or its bytes are gone.
            CkptError, UpdateAborted: see `update`.
        """
        with self._locked():
            record = self.history.find(version, not_running=self._ran().values())
            return self._move(self._fleet, self.history.pool.index_of(record.digest), record.label, self._config)

    def verify(self, version: str = "") -> LookReport:
        """Compare what engines hold with a version, without changing anything. They are paused for it, and serve on after it.

        Args:
            version: label, digest, or the beginning of one; by default what each engine runs, as far as it is remembered.

        Raises:
            VerificationError: the version is cold, and no fingerprints of it were written down: there is nothing to compare with.
            CkptError: the look failed; nothing was changed.
        """
        return self._look(lambda looks: looks.verify(version))

    def adopt(self, checkpoint: Checkpoint, *, version: str = "", copy: bool = False) -> LookReport:
        """Prove that engines run a checkpoint already, keep it warm, and remember it: the next update can be undone.

        Args:
            checkpoint: see `update`.
            version: its label; by default the one it has, or the start of its content digest.
            copy: into the host pool, so that its files may go.

        Raises:
            VerificationError: engines hold something else, or nothing could be compared; nothing was remembered.
            CkptError: the look failed; nothing was changed.
        """
        with self._index(checkpoint) as index:
            return self._look(lambda looks: looks.adopt(index, version, copy=copy))

    def _look(self, look: Callable[[Looks], LookReport]) -> LookReport:
        with self._locked():
            self._fleet.check_options(self._config)
            looks = Looks(
                fleet=self._fleet,
                history=self.history,
                conversation=self._talk,
                config=self._config,
                agents=lambda: self._running_agents(self._fleet),
            )
            try:
                return look(looks)
            except BaseException:
                self._stop_agents()  # one of them may be what failed
                raise

    def recover(self) -> dict[str, Outcome]:
        """Finish or undo updates of these engines whose controller died; what became of each engine.

        An engine that is whole is resumed. Where every rank had verified, the update is finished; else the others go back to what
        they ran before. Where neither version is warm they stay as they are: POISONED.
        """
        with self._locked():
            return recover(self._fleet, self.history, self._replay)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else updates these engines, and all are checked."""
        with EndpointLocks(self._environment.socket_root) as locks:
            for member in self._fleet.members:
                locks.take(member.endpoint.url)
            self._fleet.check()
            yield

    def _move(self, fleet: Fleet, index: SourceIndex, version: str, config: UpdateConfig) -> UpdateReport:
        """One update; where it fails in the middle, back again."""
        ran = self._ran()
        digests = {record.digest if record else "" for record in ran.values()}
        if config.undo is Undo.REPLAY and not all(map(self.history.warm, digests)):
            _log.warning(
                "this update cannot be undone: what engines run is not warm here; `ckpt adopt` tells what they run"
            )
        session = self._session(
            fleet, index, version, config, on_state=partial(note, fleet=fleet, history=self.history, ran=ran)
        )
        try:
            report = session.run()
        except BaseException as error:
            insist(self._stop_agents)  # one of them may be what failed; the next update starts with new ones
            if isinstance(error, UpdateAborted):
                raise self._aborted(error, session, fleet, ran) from error.__cause__
            if session.state is SessionState.COMMITTED:  # engines could not be resumed
                self._record(session)
            elif session.state is SessionState.PLANNED and isinstance(error, CkptError):
                self.history.aborted(session.update_id, {})  # else nobody knows how it ended: it stays to be recovered
            raise
        self._known_plan = session.known_plan
        self._record(session)
        return replace(report, predicted=prediction_of(session, lambda: self._limits))

    def _record(self, session: Session) -> None:
        insist(lambda: self.history.committed(session.update_id, session.engine_records, session.content, self._config))

    def _aborted(
        self, aborted: UpdateAborted, session: Session, fleet: Fleet, ran: Mapping[str, EngineRecord | None]
    ) -> UpdateAborted:
        if aborted.outcome is Outcome.POISONED and self._config.undo is not Undo.NONE:
            known = {url: record for url, record in ran.items() if record is not None}
            aborted = go_back(aborted, fleet, known, self.history, self._replay)
        insist(lambda: self.history.aborted(session.update_id, aborted.by_endpoint))
        return aborted

    def _replay(self, fleet: Fleet, version: str, expect: Expected) -> None:
        """Move engines to a version once more, which must come out as it was."""
        config = replace(self._config, undo=Undo.NONE, trace=False)
        index = self.history.pool.index_of(expect.digest)
        try:
            session = self._session(fleet, index, version, config, expect=expect)
            try:
                session.run()
            except (CkptError, KeyboardInterrupt) as error:
                if session.state is not SessionState.COMMITTED:
                    raise
                _log.warning("the old weights are back, but: %s", error)
        finally:
            insist(self._stop_agents)  # they know a plan of other engines
        insist(lambda: self.history.runs(session.engine_records))

    def _session(
        self,
        fleet: Fleet,
        index: SourceIndex,
        version: str,
        config: UpdateConfig,
        *,
        expect: Expected | None = None,
        on_state: Callable[[Session], None] = lambda _session: None,
    ) -> Session:
        return Session(
            index,
            version=version,
            fleet=fleet,
            agents=self._running_agents(fleet),
            conversation=self._talk,
            config=config,
            known_plan=self._known_plan,
            on_progress=self._on_progress,
            expect=expect,
            on_state=on_state,
        )

    def _ran(self) -> dict[str, EngineRecord | None]:
        """What each engine runs, as far as anybody remembers."""
        return {
            member.endpoint.url: self.history.ran(member.endpoint.url, member.instance_id)
            for member in self._fleet.members
        }

    @cached_property
    def _limits(self) -> machine_limits.Limits | None:
        return machine_limits.load(self._environment.cache_root, machine_limits.identify())

    def _running_agents(self, fleet: Fleet) -> AgentPeers:
        return self._local_agents(fleet) if self._cluster is None else self._cluster_agents(self._cluster)

    def _cluster_agents(self, cluster: Cluster) -> ClusterAgents:
        if isinstance(self._agents, ClusterAgents):
            if self._agents.alive:
                return self._agents
            self._stop_agents()
        agents = ClusterAgents(self._talk, token=cluster.key.token, reading=cluster.reading)
        self._start(agents, lambda: agents.join(cluster.hosts, _JOIN_TIMEOUT_S))
        return agents

    def _local_agents(self, fleet: Fleet) -> AgentGroup:
        wanted = fleet.devices()
        running = self._agents
        if isinstance(running, AgentGroup) and running.devices == wanted and running.alive:
            return running
        self._stop_agents()
        agents = AgentGroup(
            wanted,
            conversation=self._talk,
            directory=self._memory,
            token=secrets.token_hex(16),
            silence_timeout_s=_AGENT_SILENCE_S,
            orphans=(self._sockets,),
            log_level=self._environment.log_level,
        )
        self._start(agents, lambda: agents.join(_JOIN_TIMEOUT_S))
        return agents

    def _start(self, agents: AgentGroup | ClusterAgents, join: Callable[[], None]) -> None:
        self._agents = agents
        try:
            join()
        except BaseException:
            self._stop_agents()
            raise

    def _stop_agents(self) -> None:
        self._known_plan = None
        self._talk.watches.clear()
        if self._agents is not None:
            self._agents.stop()
        self._agents = None

    @contextmanager
    def _index(self, checkpoint: Checkpoint) -> Iterator[SourceIndex]:
        if not isinstance(checkpoint, Mapping):
            yield checkpoint.index() if isinstance(checkpoint, Peers) else open_checkpoint(checkpoint)
            return
        on_gpu = checkpoint and all(getattr(tensor, "is_cuda", False) for tensor in checkpoint.values())
        if on_gpu and self._cluster is None:  # parts of what is on a GPU cannot be packed for other hosts
            exported = export_tensors(checkpoint)
            if exported is not None:
                yield exported.index
                return
            _log.warning("this process's GPU memory cannot be exported (allocator settings); going over host memory")
        yield self._staged.stage(checkpoint, lambda: private_directory(self._memory, "pool-"))


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
