"""The receiving side, inside each rank process of an engine. It knows no engine: it calls hooks.

    identify, supports -> RankHello          |  what may be refused, is refused before anything is touched
    MapRings                                 |  in the background; only where no plan is known
    AskLayout          -> LayoutReply        |
    OfferPlan          -> PlanAgreed         |
    Begin: begin, load ..., finish           |  from here on, any failure ends in poison, abort, and a typed outcome
                       -> Verified           |
    Commit: disarm     -> Committed          |  or Abort -> Aborted

    RankHello, AskHeld -> HeldSlices, CompareHeld -> Compared, Abort -> Aborted: a look, which writes nothing

The controller's silence is an abort, too: a rank never waits for ever, and never serves what was not committed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from ckpt_core import plugins, process, wire
from ckpt_core.apply import Applier
from ckpt_core.channel import AbortRequested, Line
from ckpt_core.config import VerifyLevel
from ckpt_core.contract import AbortOutcome, AttachResult, RankInfo, Rendezvous, Update
from ckpt_core.errors import EngineStateError, PlanError, TransferTimeout
from ckpt_core.failure import describe, failure_message
from ckpt_core.guard import Guard
from ckpt_core.incoming import Incoming
from ckpt_core.layout import Layout, whole_layout
from ckpt_core.per_worker import PerWorker
from ckpt_core.pipeline import receive
from ckpt_core.plan import Plan, check_plan
from ckpt_core.polling import Poller
from ckpt_core.rank_look import show_held
from ckpt_core.record.recorded import RecordedModel
from ckpt_core.ring_maps import RingMaps
from ckpt_core.snapshot import RankSnapshot
from ckpt_core.stats import RankStats
from ckpt_core.trace import SpanRecorder, SpanStage, TrackKind
from ckpt_core.tracks import ProcessTracks
from ckpt_core.transport.base import RingReader
from ckpt_core.uncollected import uncollected
from ckpt_core.verify import Verifier, fingerprint
from ckpt_core.wanted import Wanted

_log = logging.getLogger(__name__)


def attach(
    worker: Any, rendezvous: Rendezvous, *, engine: str, plugin: plugins.EnginePlugin | None = None
) -> AttachResult:
    """Take part in one update: blocks until it is committed or undone on this rank. Never raises.

    Args:
        worker: whatever the engine's plugin calls a worker; handed to the hooks as it is.
        rendezvous: from the engine's attach call.
        engine: name of the plugin.
        plugin: the plugin itself, where it is not installed under that name.
    """
    rank = -1
    try:
        plugin = plugin or plugins.load(engine)
        info: RankInfo = plugin.hook.ckpt_identify(worker=worker)
        rank = info.rank
        with uncollected(), _line(rendezvous) as line:
            outcome, error = _Attachment(worker, plugin, line, info, rendezvous).run()
    except Exception as failure:  # noqa: BLE001 raising into an engine's RPC may desynchronise it for good
        _log.exception("attach failed on rank %d", rank)
        outcome, error = AbortOutcome.UNTOUCHED.value, describe(failure)
    return AttachResult(rank=rank, outcome=outcome, error=error)


def _line(rendezvous: Rendezvous) -> Line:
    return Line(rendezvous.address, rendezvous.token, rendezvous.silence_timeout_s, server_key=rendezvous.server_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedPlan:
    """A plan that this rank checked against its own layout, and what it takes out of it."""

    plan: Plan
    receiver: int
    incoming: Incoming


_known: PerWorker[AgreedPlan] = (
    PerWorker()
)  # of the last committed update; whoever takes it gives it back when it holds again
_recorded: PerWorker[RecordedModel] = PerWorker()


def _recorded_of(worker: Any, plugin: plugins.EnginePlugin) -> RecordedModel | None:
    """What is known of this worker's loader. None where its plugin lets nobody record it."""
    if not plugin.has("ckpt_recording_target"):
        return None
    recorded = _recorded.get(worker)
    if recorded is None:
        try:
            recorded = RecordedModel(plugin, worker)
        except TypeError:  # without weak references nothing can be kept for it
            return None
        _recorded.put(worker, recorded)
    return recorded


class _Attachment:
    """One rank in one update."""

    def __init__(
        self, worker: Any, plugin: plugins.EnginePlugin, line: Line, info: RankInfo, rendezvous: Rendezvous
    ) -> None:
        self._worker = worker
        self._plugin = plugin
        self._hook = plugin.hook
        self._line = line
        self._info = info
        self._rendezvous = rendezvous
        self._rings = RingMaps(info.device_index)
        self._readers: list[RingReader] = []
        self._incoming: Incoming | None = None
        self._update: Update | None = None  # set before begin is called: from then on weights may be touched
        self._phase = "attach"
        self._recorded = _recorded_of(worker, plugin)
        self._guard = Guard(worker, plugin.hook, rank=info.rank)
        self._snapshot: RankSnapshot | None = None
        self._learned = False

    def run(self) -> tuple[str, str]:
        """Outcome and error text of this rank."""
        try:
            offer, agreed = self._agree()
            self._load(offer, agreed)
            self._commit()
            if not self._learned and not (
                self._recorded is not None and self._recorded.lost
            ):  # else the next layout is another
                _known.put(self._worker, agreed)
        except Exception as error:  # noqa: BLE001 whatever it is, the rank must be undone
            return self._undo(error).value, describe(error)
        finally:
            self._unmap()
        return "committed", ""

    def _unmap(self) -> None:
        if self._incoming is not None:
            self._incoming.unmap()
        self._rings.close()

    def _agree(self) -> tuple[wire.OfferPlan, AgreedPlan]:
        """Up to the agreed plan: what may be refused, is refused here."""
        known = _known.pop(self._worker)
        refusal = self._refusal()
        # a worker that refuses may not have its memory: nothing is looked at then
        if refusal is None and self._recorded is not None and not self._recorded.still_holds():
            known = None
        self._line.send(
            wire.RankHello(
                endpoint_index=self._rendezvous.endpoint_index,
                rank=self._info,
                process=process.current(),
                known_plan=known.plan.digest if known else "",
            )
        )
        if refusal is not None:
            raise refusal
        first = self._line.expect(wire.MapRings, wire.OfferPlan, wire.AskHeld)
        if isinstance(first, wire.AskHeld):
            self._phase = "look"
            if known is not None:
                _known.put(self._worker, known)
            show_held(self._line, first, self._worker, self._plugin)
        elif isinstance(first, wire.OfferPlan):
            offer = first
        else:
            assert isinstance(first, wire.MapRings)
            offer, known = self._agree_on_new(first.rings)
        if known is None:
            raise PlanError(
                "the controller offers a plan that this rank does not know; install the same ckpt-core on both"
            )
        self._phase = "plan"
        self._take_rings(offer.rings, known)
        self._line.send(wire.PlanAgreed(digest=known.plan.digest))
        return offer, known

    def _agree_on_new(self, rings: wire.RingSet) -> tuple[wire.OfferPlan, AgreedPlan | None]:
        """The offer, and its plan once it is checked: where this rank and the controller know none that holds."""
        self._rings.begin(rings)
        ask = self._line.expect(wire.AskLayout)
        layout = self._layout(ask)
        ask.manifest.warm()  # while the controller plans
        wanted = Wanted(ask.manifest, layout)
        offer = self._line.expect(wire.OfferPlan)
        return offer, self._check(offer, wanted)

    def _refusal(self) -> Exception | None:
        """Why this worker cannot be updated now; told when there is somebody to tell it to."""
        try:
            self._hook.ckpt_supports(worker=self._worker)
        except Exception as refusal:  # noqa: BLE001 raised again, after the hello
            return refusal
        return None

    def _layout(self, ask: wire.AskLayout) -> Layout:
        self._phase = "layout"
        manifest = ask.manifest
        layout: Layout = self._hook.ckpt_layout(worker=self._worker, manifest=manifest) or whole_layout(manifest)
        if layout.missing and self._guard.armed:
            lacking = f"{len(layout.missing)} tensors that the engine needs, e.g. {layout.missing[0]!r:.200}"
            raise EngineStateError(
                f"rank {self._info.rank}: an earlier update left mixed weights, and this checkpoint, which lacks {lacking}, "
                "cannot mend them; send a whole checkpoint, or restart the engine"
            )
        if self._recorded is not None:
            layout = self._recorded.layout(manifest, layout, replay=ask.replay)
        self._line.send(wire.LayoutReply(layout=layout))
        return layout

    def _check(self, offer: wire.OfferPlan, wanted: Wanted) -> AgreedPlan | None:
        self._phase = "plan"
        plan, receiver = offer.plan, offer.rings.receiver
        if plan is None:
            return None
        if not 0 <= receiver < plan.receivers:
            raise PlanError(f"the plan is for {plan.receivers} ranks, this one is to be number {receiver}")
        check_plan(plan, wanted.manifest, {receiver: wanted})
        return AgreedPlan(plan=plan, receiver=receiver, incoming=Incoming(plan, wanted))

    def _take_rings(self, rings: wire.RingSet, agreed: AgreedPlan) -> None:
        plan = agreed.plan
        expected = (plan.agents, agreed.receiver, plan.receivers)
        if (got := (len(rings.offers), rings.receiver, rings.receivers)) != expected:
            raise PlanError(f"agents, this rank's number, ranks: the plan has {expected}, the offered rings {got}")
        if small := [offer for offer in rings.offers if offer.size_bytes < plan.ring_bytes]:
            raise PlanError(
                f"the plan needs rings of {plan.ring_bytes} bytes, agent {small[0].owner} offers {small[0]}"
            )
        self._readers = self._rings.take(rings)
        self._incoming = agreed.incoming
        self._incoming.map(self._readers, plan.ring_bytes)

    def _load(self, offer: wire.OfferPlan, agreed: AgreedPlan) -> None:
        begin = self._line.expect(wire.Begin)
        assert isinstance(begin, wire.Begin)
        verifier = Verifier(VerifyLevel(offer.verify), begin.parts)
        replayed = self._recorded.roots if self._recorded is not None else frozenset[str]()
        update = Update(
            update_id=offer.update_id,
            version=offer.version,
            digest=offer.digest,
            expected=agreed.incoming.names - replayed,
            partial=bool(replayed),
            replayed=agreed.incoming.names & replayed,
        )
        if offer.snapshot:
            self._snapshot = RankSnapshot(self._worker, self._hook, update, self._guard)
        begin_s = self._begin(update)
        tracks = ProcessTracks(f"rank {self._info.rank}", TrackKind.RANK, wanted=offer.trace)
        if offer.trace and self._readers:
            tracks.timer = self._readers[0].timer()
        applier = Applier(
            self._plugin,
            self._worker,
            update,
            agreed.incoming,
            verifier,
            recorded=self._recorded,
            spans=tracks.spans,
            timer=tracks.timer,
        )
        self._phase = "load"
        wait_s = self._receive(offer, agreed.plan, applier, tracks.spans)
        self._phase = "finish"
        start = time.perf_counter()
        with tracks.spans.timed(SpanStage.FINISH):
            self._hook.ckpt_finish(worker=self._worker, update=update)
            self._learned = self._recorded is not None and self._recorded.finish()
        finish_s = time.perf_counter() - start
        self._phase = "verify"
        verify_s = self._compare(verifier)
        with tracks.spans.timed(SpanStage.FINGERPRINT):
            print_, fingerprint_s = self._fingerprint(wanted=offer.fingerprint)
        stats = RankStats(
            received_bytes=applier.received_bytes,
            wait_s=wait_s,
            load_s=applier.load_s,
            digest_s=applier.digest_s + verify_s,
            begin_s=begin_s,
            finish_s=finish_s,
            fingerprint_s=fingerprint_s,
            retained_bytes=applier.retained_bytes,
            digested_bytes=verifier.arrived_bytes,
            live_bytes=verifier.live_bytes,
            replayed_bytes=applier.replayed_bytes,
            recorded_share=self._recorded.recorded_share if self._recorded is not None else 0.0,
            learned=self._learned,
            ignored=tuple(applier.ignored),
            tracks=tracks.take(),
        )
        if tracks.timer is not None:
            tracks.timer.close()
        self._line.send(wire.Verified(stats=stats, fingerprint=print_))

    def _begin(self, update: Update) -> float:
        self._phase = "begin"
        self._update = update
        start = time.perf_counter()
        if self._recorded is not None:
            self._recorded.begin()
        try:
            self._hook.ckpt_begin(worker=self._worker, update=update)
        except EngineStateError:
            self._update = None  # a refusal, which by contract changed nothing
            raise
        return time.perf_counter() - start

    def _receive(self, offer: wire.OfferPlan, plan: Plan, applier: Applier, spans: SpanRecorder) -> float:
        reporter = _Reporter(self._line, applier)
        timeout_s = offer.transfer_timeout_s
        poller = Poller(
            check=reporter.check,
            deadline=time.monotonic() + timeout_s,
            expired=lambda what: TransferTimeout(f"rank {self._info.rank} waited {timeout_s:g} s for {what}"),
        )
        receive(
            plan,
            offer.rings.receiver,
            readers=self._readers,
            expect=applier.expect,
            consume=applier.consume,
            poller=poller,
            spans=spans,
        )
        return poller.waited_s

    def _compare(self, verifier: Verifier) -> float:
        """Digests that the device still works on, and those of what lives now. Seconds."""
        start = time.perf_counter()
        verifier.settle()
        if verifier.level is VerifyLevel.LIVE and self._recorded is not None:
            self._recorded.check_live(verifier)
        return time.perf_counter() - start

    def _fingerprint(self, *, wanted: bool) -> tuple[str, float]:
        start = time.perf_counter()
        live = self._hook.ckpt_live(worker=self._worker) if wanted else None
        return (fingerprint(live) if live is not None else "", time.perf_counter() - start)

    def _commit(self) -> None:
        self._phase = "commit"
        self._line.expect(wire.Commit)
        self._guard.disarm()
        self._line.send(wire.Committed())

    def _undo(self, error: Exception) -> AbortOutcome:
        """Say so first, for the others' sake; then poison, then abort. That something cannot be said hinders nothing."""
        if not isinstance(error, AbortRequested):
            self._tell(failure_message(error, self._phase))
        outcome = AbortOutcome.UNTOUCHED if self._update is None else self._abort(self._update, error)
        self._tell(wire.Aborted(outcome=outcome))
        return outcome

    def _abort(self, update: Update, error: Exception) -> AbortOutcome:
        wrote = self._recorded is not None and self._recorded.wrote
        if self._recorded is not None:
            self._recorded.forget()  # what was learned may be what went wrong
        cause = f"update {update.update_id} failed in {self._phase}: {describe(error)}"
        outcome = self._guard.abort(update, cause, wrote=wrote)
        return outcome if self._snapshot is None else self._snapshot.put_back(outcome)

    def _tell(self, message: wire.AnyMessage) -> None:
        try:
            self._line.send(message)
        except Exception:  # noqa: BLE001 undoing goes on
            _log.exception("rank %d could not tell how it ended", self._info.rank)


class _Reporter:
    """Called a few hundred times a second during a transfer: looks for an abort, and tells how far the rank is."""

    _EVERY_S = 0.1

    def __init__(self, line: Line, applier: Applier) -> None:
        self._line = line
        self._applier = applier
        self._reported = time.monotonic()

    def check(self) -> None:
        self._line.check_abort()
        if time.monotonic() - self._reported > self._EVERY_S:
            self._reported = time.monotonic()
            self._line.send(wire.Progress(done_bytes=self._applier.received_bytes))
