"""Scripted ranks and agents. They do by messages what worker.py and agent.py do; the guard is the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ckpt_core import wire
from ckpt_core.contract import AbortOutcome, DeviceKind, RankInfo, Rendezvous, Update
from ckpt_core.guard import Guard
from ckpt_core.layout import whole_layout
from ckpt_core.plan import Plan
from ckpt_core.stats import AgentStats, RankStats

if TYPE_CHECKING:
    from states_world import Engine, World

MIXED = "mixed"
_RANK_STATS = RankStats(
    received_bytes=1, wait_s=0.0, load_s=0.0, digest_s=0.0, begin_s=0.0, finish_s=0.0, fingerprint_s=0.0,
    retained_bytes=0, digested_bytes=0,
)  # fmt: skip
_AGENT_STATS = AgentStats(sent_bytes=1, copy_s=0.0, wait_s=0.0, total_s=0.0)


class Actor:
    """A process that answers messages, as long as it lives and is not stopped.

    Attributes:
        stuck: it hears nothing, until it is woken at the end.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.pid = world.new_pid(self)
        self.alive, self.stuck = True, False
        self.peer = b""
        self.inbox: list[wire.AnyMessage] = []

    def say(self, message: wire.AnyMessage) -> None:
        """To the controller."""
        self.world.outbox.append((self.peer, message))

    def work(self) -> bool:
        """Answer what came; whether something had."""
        worked = False
        while self.inbox and self.alive and not self.stuck:
            self.handle(self.inbox.pop(0))
            worked = True
        return worked

    def handle(self, message: wire.AnyMessage) -> None:
        raise NotImplementedError

    def choice(self, what: str, *options: str) -> str:
        """What this one does now."""
        return self.world.chooser.choose(f"{self.name}: {what}", *options)

    def stop(self, message: wire.AnyMessage | None) -> None:
        """Hear nothing from now on; the message is there when it wakes."""
        self.stuck = True
        if message is not None:
            self.inbox.insert(0, message)


class Rank(Actor):
    """One rank of an engine.

    Attributes:
        held: the version its weights are of, or MIXED.
        stage: "out", "late" (has not dialled in), "talk", "loading", "verified".
        commits: versions that it committed.
        armed: the guard's effect in the worker.
    """

    def __init__(self, world: World, engine: Engine, number: int, held: str) -> None:
        super().__init__(world, f"rank {number} of {engine.name}")
        self.engine, self.number, self.held = engine, number, held
        self.stage, self.armed = "out", False
        self.commits: set[str] = set()
        self.rendezvous: Rendezvous | None = None
        self._hook = SimpleNamespace(ckpt_poison=self._poison, ckpt_abort=self._abort_hook)
        self._worker = SimpleNamespace()
        self._guard = Guard(self._worker, self._hook, rank=number)
        self._fails: set[str] = set()
        self.target, self._before, self.plan = "", held, ""
        self._snapshot = False

    # -- the update ----------------------------------------------------------------------------------------------
    def attach(self, rendezvous: Rendezvous) -> None:
        """Dial in."""
        self.rendezvous, self.stage = rendezvous, "late"
        self.inbox.clear()
        match self.choice("attached", "ok", "die", "mute"):
            case "ok":
                self.dial()
            case "die":
                self.die()
            case "mute":
                self.stop(None)

    def dial(self) -> None:
        """The hello."""
        assert self.rendezvous is not None
        self.stage = "talk"
        self.peer = self.world.new_peer(self, self.rendezvous.token)
        info = RankInfo(
            instance_id=self.engine.instance, device_kind=DeviceKind.CUDA, device_index=self.number,
            device_uuid=f"GPU-{self.number}", rank=self.number, world_size=len(self.engine.ranks),
        )  # fmt: skip
        index = self.rendezvous.endpoint_index
        process = self.world.process(self.pid)
        self.say(wire.RankHello(endpoint_index=index, rank=info, process=process, known_plan=self.plan))

    def handle(self, message: wire.AnyMessage) -> None:
        if self.stage == "out":
            return
        match message:
            case wire.Abort():
                self._on_abort(message)
            case wire.AskLayout():
                self._reply(
                    "asked for a layout", message, lambda: wire.LayoutReply(layout=whole_layout(message.manifest))
                )
            case wire.OfferPlan():
                self._on_offer(message)
            case wire.Begin():
                self._on_begin(message)
            case wire.Commit():
                self._on_commit(message)

    def _reply(self, what: str, message: wire.AnyMessage, answer: Any) -> None:
        match self.choice(what, "ok", "fail", "die", "mute"):
            case "ok":
                self.say(answer())
            case "fail":
                self._fail()
            case "die":
                self.die()
            case "mute":
                self.stop(message)

    def _on_offer(self, offer: wire.OfferPlan) -> None:
        self.target, self._snapshot = self.world.version_of(offer.digest), offer.snapshot
        if isinstance(offer.plan, Plan):
            self.plan = offer.plan.digest
        self._reply("offered a plan", offer, lambda: wire.PlanAgreed(digest=self.plan))

    def _on_begin(self, message: wire.AnyMessage) -> None:
        if not self.engine.paused:
            self._fail("EngineStateError")
            return
        match self.choice(
            "told to begin", "ok", "refuse", "break", "break, abort fails", "break, guard fails", "die", "mute"
        ):
            case "ok":
                self._touch()
            case "refuse":
                self._fail("EngineStateError")
            case "die":
                self._touch()
                self.die()
            case "mute":
                self._touch()
                self.stop(None)
            case broken:
                self._touch()
                self._fails = {broken.removeprefix("break").removeprefix(", ")}
                self._fail()

    def _touch(self) -> None:
        self._before, self.held, self.stage = self.held, MIXED, "loading"

    def finish(self) -> None:
        """All buckets came."""
        self.held, self.stage = self.target, "verified"
        self.say(wire.Verified(stats=_RANK_STATS, fingerprint=f"print of {self.target}"))

    def _on_commit(self, message: wire.AnyMessage) -> None:
        picked = self.choice("told to commit", "ok", "fail", "die", "mute", "commit and die", "commit and say nothing")
        if picked == "fail":
            self._fail()
        elif picked == "die":
            self.die()
        elif picked == "mute":
            self.stop(message)
        else:
            assert self.stage == "verified", "committed without a word of verification"
            self._guard.disarm()
            self.commits.add(self.target)
            if picked == "ok":
                self.say(wire.Committed())
            self.out()
            if picked == "commit and die":
                self.die()

    def _on_abort(self, message: wire.AnyMessage) -> None:
        match self.choice("told to abort", "ok", "abort fails", "guard fails", "die", "mute"):
            case "die":
                self.die()
            case "mute":
                self.stop(message)
            case picked:
                self._fails = {picked}
                self.end()

    def _fail(self, error: str = "RuntimeError") -> None:
        self.say(wire.Failure(error=error, message="so the script says", phase="test"))
        self.end()

    def end(self) -> None:
        """Undo, tell, and leave."""
        outcome = AbortOutcome.UNTOUCHED
        if self.stage in ("loading", "verified"):
            was_armed = self.armed
            update = Update(update_id="u", version=self.target, digest="", expected=frozenset())
            outcome = self._guard.abort(update, "so the script says", wrote=False)
            if outcome is AbortOutcome.RELOADABLE and self._snapshot and not was_armed:
                outcome = self._put_back()
        if self.stage != "late":
            self.say(wire.Aborted(outcome=outcome))
        self.out()

    def _put_back(self) -> AbortOutcome:
        if self.choice("snapshot is put back", "ok", "fail") == "fail":
            return AbortOutcome.RELOADABLE
        self.held = self._before
        self._guard.disarm()
        return AbortOutcome.RESTORED

    def out(self) -> None:
        """The attach call is over on this rank."""
        self.stage, self._fails = "out", set()
        self.inbox.clear()
        self.engine.rank_left()

    def die(self) -> None:
        """The process is gone, and its weights with it."""
        self.alive = False
        self.stage = "out"
        self.engine.rank_died()

    def silence(self) -> None:
        """Nobody talks to it any more."""
        if self.alive and self.stage != "out":
            self.inbox.append(wire.Abort(cause="silence"))

    # -- hooks of the guard --------------------------------------------------------------------------------------
    def _poison(self, worker: object, cause: str | None) -> None:
        if cause is not None and "guard fails" in self._fails:
            raise RuntimeError("cannot arm")
        self.armed = cause is not None

    def _abort_hook(self, worker: object, update: Update, cause: str) -> AbortOutcome:
        if "abort fails" in self._fails:
            raise RuntimeError("cannot abort")
        return AbortOutcome.RELOADABLE


class Agent(Actor):
    """One agent process; also what `spawn` returns.

    Attributes:
        ring: it holds one.
        sent: it sent all of the plan that it took last.
    """

    def __init__(self, world: World, config: Any) -> None:
        super().__init__(world, f"agent {config.index}")
        self.ring = self.sent = self._read = False
        self._plan = world.agent_plans.get(config.index, "")
        self._index, self._count, self.token = config.index, config.count, config.token
        self.peer = world.new_peer(self, config.token)
        match self.choice("started", "ok", "die", "mute"):
            case "ok":
                self.say(wire.AgentHello(agent=self._index, count=self._count, process=world.process(self.pid)))
            case "die":
                self.exit()
            case "mute":
                self.stop(None)

    def poll(self) -> int | None:
        """As a child process."""
        return None if self.alive else 1

    def exit(self) -> None:
        """Its memory goes with it."""
        self.alive = self.ring = False

    def handle(self, message: wire.AnyMessage) -> None:
        match message:
            case wire.Prepare():
                self._reply("prepares", message, "ManifestError", lambda: self._prepared(message))
            case wire.OpenRing():
                self.sent = False
                self._reply("opens a ring", message, "CapacityError", lambda: self._opened(message))
            case wire.TakePlan():
                if message.plan is not None:
                    self._plan = message.plan.digest
                self._reply("takes the plan", message, "PlanError", lambda: wire.PlanTaken(digest=self._plan))
            case wire.Send():
                self._reply("sends", message, "TransferTimeout", self._sent)
            case wire.Abort():
                self._reply("closes its ring", message, "", self._closed)
            case wire.Stop():
                self.exit()

    def _reply(self, what: str, message: wire.AnyMessage, error: str, answer: Any) -> None:
        match self.choice(what, "ok", *(["fail"] if error else []), "die", "mute"):
            case "ok":
                self.say(answer())
            case "fail":
                self.say(wire.Failure(error=error, message="so the script says", phase="test"))
            case "die":
                self.exit()
            case "mute":
                self.stop(message)

    def _prepared(self, ask: wire.Prepare) -> wire.Prepared:
        digests = {name: self.world.digest_in(ask.index) for name in ask.digest}
        again, self._read = self._read, self._read or bool(digests)
        if digests and again and self.choice("reads again", "ok", "other bytes") == "other bytes":
            digests = dict.fromkeys(digests, "0f" * 16)
        return wire.Prepared(digests=digests, parts=bytes(8 * len(ask.parts)), digest_s=0.0, locked_bytes=0, lock_s=0.0)

    def _opened(self, ask: wire.OpenRing) -> wire.RingOpened:
        self.ring = True
        offer = wire.RingOffer(owner=self._index, device="cpu", handle="", size_bytes=ask.size_bytes, control_path="")
        return wire.RingOpened(offer=offer)

    def _sent(self) -> wire.Sent:
        self.sent = True
        return wire.Sent(stats=_AGENT_STATS)

    def _closed(self) -> wire.RingClosed:
        self.ring = False
        return wire.RingClosed()
