"""One attempt to move a fleet to a checkpoint: a state machine with one owner.

    IDLE -> PLANNED -> PAUSED -> ATTACHED -> LOADING -> VERIFYING -> COMMITTED
                          \\__________\\_________\\____________\\_____-> CLEAN | RESTORED | POISONED

Nothing is written before every rank agreed on one plan; no version is published and no request resumes before every rank
of every engine verified. Any failure ends in one of the three outcomes, told by `UpdateAborted`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from functools import partial

import msgspec

from ckpt_core import wire
from ckpt_core.agent_peers import AgentPeers, Rings
from ckpt_core.agreement import Agreement, KnownPlan, Ranks, Terms, open_rings
from ckpt_core.boarding import Boarding
from ckpt_core.config import UpdateConfig
from ckpt_core.content import Content
from ckpt_core.conversation import Conversation
from ckpt_core.errors import CkptError, EngineError, Outcome, UpdateAborted
from ckpt_core.expected import Expected
from ckpt_core.fleet import Fleet
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.insist import insist
from ckpt_core.metrics import Stage, Stopwatch, UpdateReport
from ckpt_core.outcomes import SAYS, outcomes_by_endpoint, worst
from ckpt_core.report import engine_records, host_reports, rank_report, reached, tracks_of
from ckpt_core.source import SourceIndex
from ckpt_core.states import NEXT, SessionState
from ckpt_core.store_records import EngineRecord
from ckpt_core.trace import Track
from ckpt_core.uncollected import uncollected

_log = logging.getLogger(__name__)
_UNDO_TIMEOUT_S = 30.0
OnProgress = Callable[[Stage, int, int], None]


class Session:
    """See the module. `run` is called once.

    Args:
        index: where the checkpoint's bytes are.
        version: label to publish them under; empty for the first 12 digits of the content digest.
        fleet: checked, locked members.
        agents: joined agents.
        conversation: of the controller.
        config: options.
        known_plan: of the last update with these agents.
        on_progress: told stage, done and total bytes, now and then.

        expect: what ranks must hold before they commit; None for whatever the checkpoint says.
        on_state: called when the attempt moves; raises to end it.

    Attributes:
        boarding: its ranks.
        content: the checkpoint.
        version: the label.
        plan: what was carried out, once it is committed.
        known_plan: the same, to be taken again by the next update; None where the next one needs another.
    """

    def __init__(
        self,
        index: SourceIndex,
        *,
        version: str,
        fleet: Fleet,
        agents: AgentPeers,
        conversation: Conversation,
        config: UpdateConfig,
        known_plan: KnownPlan | None,
        on_progress: OnProgress,
        expect: Expected | None = None,
        on_state: Callable[[Session], None] = lambda _session: None,
    ) -> None:
        self.update_id = secrets.token_hex(6)
        self.state = SessionState.IDLE
        self.content = Content(index=index, agents=agents, config=config)
        self.version = version
        self._fleet = fleet
        self._agents = agents
        self._talk = conversation
        self._config = config
        self._known_plan = known_plan
        self.known_plan: KnownPlan | None = None
        self.plan: FleetPlan | None = None
        self._on_progress = on_progress
        self._expect = expect
        self._on_state = on_state
        self._watch = Stopwatch()
        self._started = time.perf_counter()
        self._paused_at = self._started
        self.boarding = Boarding(fleet=fleet, conversation=conversation, config=config, update_id=self.update_id)
        self._hellos, self._name = self.boarding.hellos, self.boarding.name
        self._verified: dict[bytes, wire.Verified] = {}
        self._committed: dict[bytes, wire.Committed] = {}
        self._sent: dict[bytes, wire.Sent] = {}
        self._words: dict[bytes, wire.Aborted | wire.Committed] = {}  # the last ones of ranks
        self._begun = False
        self._rings: Rings = ()
        self._ranks = Ranks(hellos={}, host_of=())

    def run(self) -> UpdateReport:
        """The whole way.

        Raises:
            CkptError: bad input, found before anything was paused.
            UpdateAborted: anything later; says what the engines hold now.
        """
        self._talk.watches.append(self._agents.check_replaced)  # cleared by commit, undo, or who stops the agents
        self._prepare()
        self._rings = self._open_rings()
        self._move(SessionState.PLANNED)
        with uncollected():
            plan = self._move_engines()
        return self._report(plan)

    def _move_engines(self) -> FleetPlan:
        """From the pause to the resume."""
        try:
            self._pause()
            self._attach()
            plan = self._agree()
            self._transfer(plan)
            self._commit()
        except BaseException as error:
            if (aborted := insist(partial(self._undo, error))) is not None:
                raise aborted from error
        self.plan = plan
        if not any(answer.stats.learned for answer in self._verified.values()):  # else rings are as asked for again
            self.known_plan = KnownPlan(
                plan=plan, ranks=self._ranks.keys, replay=self._config.replay, parts=self.content.parts
            )
        self._serve()
        return plan

    def _prepare(self) -> None:
        with self._watch.stage(Stage.PREPARE):
            self._follow(Stage.PREPARE, self.content.index.size_bytes, {})
            self.content.prepare(self._known_plan)
        self.version = self.version or self.content.label

    def _open_rings(self) -> Rings:
        """Before the pause: a device's memory is asked for while engines still serve."""
        size_bytes, _ = self._config.ring_for(self._fleet.device_kind())
        known, structure = self._known_plan, self.content.manifest.structure_digest
        if known is not None and known.plan.structure_digest == structure:
            size_bytes = known.plan.ring_bytes
        receivers = sum(member.world_size for member in self._fleet.members)
        with self._watch.stage(Stage.PREPARE):
            try:
                return open_rings(
                    self._agents, size_bytes=size_bytes, receivers=receivers, timeout_s=self._config.attach_timeout_s
                )
            except BaseException:
                self._give_back()
                raise

    def _pause(self) -> None:
        self._paused_at = time.perf_counter()
        with self._watch.stage(Stage.PAUSE):
            self._fleet.pause(self._config.pause_mode)
        self._move(SessionState.PAUSED)

    def _attach(self) -> None:
        with self._watch.stage(Stage.ATTACH):
            self._agents.check_alive()
            self.boarding.board()
            host_of = [self._agents.host_of(hello.process, self._name(hello)) for hello in self._hellos.values()]
            self._ranks = Ranks(hellos=self._hellos, host_of=tuple(host_of))
        self._move(SessionState.ATTACHED)

    def _terms(self) -> Terms:
        return Terms(
            update_id=self.update_id,
            version=self.version,
            manifest=self.content.manifest,
            structure=self.content.structure,
            config=self._config,
            device_kind=self._fleet.device_kind(),
        )

    def _agree(self) -> FleetPlan:
        terms = self._terms()
        agreement = Agreement(self._talk, self._agents, self._rings, self._ranks, terms, name=self._name)
        known = self._known_plan
        if known is not None and known.fits(terms, self._ranks, self._rings):
            with self._watch.stage(Stage.PLAN):
                agreement.agree_on_known(known.plan)
            return known.plan
        with self._watch.stage(Stage.LAYOUT):
            layouts = agreement.ask_layouts()
        with self._watch.stage(Stage.PLAN):
            plan = agreement.agree_on_new(layouts)
            self.content.take_plan(plan, [reply.layout for reply in layouts])
        return plan

    def _transfer(self, plan: FleetPlan) -> None:
        self._move(SessionState.LOADING)
        self._begun = True
        with self._watch.stage(Stage.TRANSFER):
            self._follow(Stage.TRANSFER, plan.needed_bytes, {})
            for rank, peer in enumerate(self._hellos):
                self._talk.tell(peer, wire.Begin(parts=self.content.expected_by(rank)))
            self._agents.start_sending(timeout_s=self._config.transfer_timeout_s, trace=self._config.trace)
            self._await_transfer()
            self.content.check_again()
            if self._expect is not None:
                self._expect.check(self.engine_records)
        self._move(SessionState.VERIFYING)

    @property
    def engine_records(self) -> list[EngineRecord]:
        """What each engine runs, once it is committed."""
        return engine_records(
            self._fleet,
            self.boarding,
            self._verified,
            content=self.content,
            version=self.version,
            update_id=self.update_id,
        )

    def _await_transfer(self) -> None:
        wanted: dict[bytes, type[wire.Verified | wire.Sent]] = dict.fromkeys(self._hellos, wire.Verified)
        wanted |= dict.fromkeys(self._agents.peers, wire.Sent)
        answers = self._talk.gather(wanted, timeout_s=self._config.transfer_timeout_s)
        for peer, answer in answers.items():
            if isinstance(answer, wire.Verified):
                self._verified[peer] = answer
            elif isinstance(answer, wire.Sent):
                self._sent[peer] = answer

    def _commit(self) -> None:
        with self._watch.stage(Stage.COMMIT):
            self._talk.watches.clear()  # attach calls come back from now on
            for peer in self._hellos:
                self._talk.tell(peer, wire.Commit(version=self.version, digest=self.content.digest))
            wanted = dict.fromkeys(self._hellos, wire.Committed)
            # nobody needs an agent any more: only the ranks' own deaths count
            self._talk.gather(wanted, timeout_s=self._config.commit_timeout_s, into=self._committed, only_theirs=True)
        self._move(SessionState.COMMITTED)

    def _serve(self) -> None:
        """Flush and resume; the weights are committed, whatever happens here. An engine that cannot holds no other one up."""
        try:
            with self._watch.stage(Stage.DETACH):
                late = self._attempt(self.boarding.leave)
            with self._watch.stage(Stage.FLUSH):
                failed = self._fleet.flush(
                    accept_stale=self._config.allow_stale_cache, timeout_s=self._config.commit_timeout_s
                )
            whole = [member.endpoint.url for member in self._fleet.members if member.endpoint.url not in failed]
            with self._watch.stage(Stage.RESUME):
                self._fleet.resume(self.version, only=whole)
            if errors := [*failed.values(), *late]:
                raise errors[0]
        except CkptError as error:
            error.args = (f"version {self.version} is committed on every rank, but: {error}",)
            raise
        except Exception as error:
            raise EngineError(
                f"version {self.version} is committed on every rank, but a plugin failed to flush or resume: {error!r}"
            ) from error
        finally:
            self._give_back()

    def _undo(self, error: BaseException) -> UpdateAborted | None:
        """Tell everybody, learn what every rank holds, free everything, resume what is whole.

        None where every rank had committed already: then there is nothing to undo.
        """
        self._talk.on_progress = lambda _name, _progress: None
        _log.info("undoing update %s in state %s: %s", self.update_id, self.state.value, error)
        self._talk.watches.clear()
        farewell = wire.Abort(cause=str(error) or type(error).__name__)
        self._talk.turn_away(farewell)  # ranks that have not dialled in yet are on their way
        for peer in self._hellos:
            self._talk.tell(peer, farewell)
        urls = [member.endpoint.url for member in self._fleet.members]
        by_endpoint = outcomes_by_endpoint(urls, self._hellos, self._last_words(), begun=self._begun)
        for member in self._fleet.members:
            # not touched by this update, it still is what it was; and who goes back had not been whole
            was_mixed = member.was_poisoned or self._expect is not None
            if was_mixed and by_endpoint[member.endpoint.url] is Outcome.CLEAN:
                by_endpoint[member.endpoint.url] = Outcome.POISONED
        outcome = worst(by_endpoint.values())
        if outcome is Outcome.COMMITTED:
            if self.state is not SessionState.COMMITTED:  # an interrupt may come right behind the commit
                self._move(SessionState.COMMITTED)
            return None
        if self.state in NEXT:  # else it was interrupted here
            self._move(SessionState(outcome.value))
        self._talk.idle_until(lambda: self._fleet.detach(0.0), timeout_s=self._config.commit_timeout_s)
        causes = [error, *self._attempt(self.boarding.leave), *self._attempt(self._give_back)]
        whole = [url for url, found in by_endpoint.items() if found in (Outcome.CLEAN, Outcome.RESTORED)]
        causes += self._attempt(lambda: self._fleet.resume_unchanged(whole))
        return UpdateAborted(
            f"update {self.update_id} to {self.version}: {SAYS[outcome]} Cause: {error or type(error).__name__}",
            outcome=outcome,
            by_endpoint=by_endpoint,
            causes=causes,
        )

    def _last_words(self) -> dict[bytes, wire.Aborted | wire.Committed]:
        """How every rank ended that still tells: undone, or committed before it heard of the failure."""
        open_ends: dict[bytes, tuple[type[wire.Aborted | wire.Committed], ...]] = {
            peer: (wire.Aborted, wire.Committed) for peer in self._hellos if peer not in self._committed
        }
        open_ends = {peer: kinds for peer, kinds in open_ends.items() if peer not in self._words}
        words: dict[bytes, wire.Aborted | wire.Committed] = {}
        try:
            self._talk.gather(open_ends, timeout_s=_UNDO_TIMEOUT_S, patient=True, into=words)
        finally:
            self._words |= words  # nobody says them twice
        return {**self._words, **self._committed}

    def _attempt(self, call: Callable[[], None]) -> list[BaseException]:
        """A step of the way back must not stop the next one."""
        try:
            call()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 told among the causes
            return [error]
        return []

    def _give_back(self) -> None:
        """Rings given back. Not before ranks have unmapped them, and nobody waits for a resume meanwhile."""
        self._agents.close_rings(timeout_s=self._config.commit_timeout_s)

    def _follow(self, stage: Stage, total: int, done_by_name: dict[str, int]) -> None:
        def note(name: str, progress: wire.Progress) -> None:
            done_by_name[name] = progress.done_bytes
            self._on_progress(stage, sum(done_by_name.values()), total)

        self._talk.on_progress = note

    def _move(self, state: SessionState) -> None:
        assert state in NEXT[self.state], f"no way from {self.state} to {state}"
        self.state = state
        self._on_state(self)

    def _report(self, plan: FleetPlan) -> UpdateReport:
        manifest = self.content.manifest
        now = time.perf_counter()
        return UpdateReport(
            update_id=self.update_id,
            version=self.version,
            digest=self.content.digest,
            outcome=Outcome.COMMITTED,
            size_bytes=manifest.size_bytes,
            tensors=len(manifest.tensors),
            seconds=now - self._started,
            pause_s=now - self._paused_at,
            stages=self._watch.seconds,
            transfer_gb_s=plan.size_bytes / 1e9 / self._watch.seconds[Stage.TRANSFER.value],
            ring_bytes=plan.ring_bytes,
            verified=reached(self._config.level, [answer.stats for answer in self._verified.values()]).value,
            in_flight=self._fleet.in_flight(self._config.pause_mode, self.version),
            digest_s=self.content.pool.digest_s,
            locked_bytes=self.content.pool.locked_bytes,
            lock_s=self.content.pool.lock_s,
            ranks=tuple(
                rank_report(
                    hello,
                    self._verified[peer],
                    self._fleet.members[hello.endpoint_index].endpoint,
                    version=self.version,
                    digest=self.content.digest,
                )
                for peer, hello in self._hellos.items()
            ),
            agents=tuple(msgspec.structs.replace(self._sent[peer].stats, tracks=()) for peer in self._agents.peers),
            hosts=host_reports(self._agents.hosts, plan, self._sent),
            tracks=self._tracks() if self._config.trace else (),
        )

    def _tracks(self) -> tuple[Track, ...]:
        sent = [self._sent[peer] for peer in self._agents.peers]
        ranks = {self._name(hello): self._verified[peer] for peer, hello in self._hellos.items()}
        return tracks_of(self._watch, sent, ranks)
