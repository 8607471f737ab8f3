"""Engines, agents and time of one run, and the truth about them: what every rank holds, and who serves."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from states_actors import MIXED, Actor, Agent, Rank
from states_explorer import Chooser

from ckpt_core import wire
from ckpt_core.capability import FULL, Capability
from ckpt_core.contract import DeviceKind, EndpointState, EndpointStatus, EngineInfo, PauseMode, Rendezvous
from ckpt_core.errors import EngineError, EngineUnavailable
from ckpt_core.fleet import Member
from ckpt_core.source import SourceIndex

ENGINES, RANKS = 2, 2
_DEVICES = ("GPU-0", "GPU-1")  # both engines are on these
_INFO = EngineInfo(name="toy", plugin_version="1", engine_version=None, capabilities=dict.fromkeys(Capability, FULL))


class Killed(BaseException):
    """The controller is gone: its handlers still run, but nothing they do has an effect."""


class Engine:
    """One engine, as its plugin shows it.

    Attributes:
        paused: no requests.
        label: the version it was last resumed with.
        instance: which life of it.
        member: what the controller knows of it.
        attached: the attach call, and whether it hangs after its ranks left.
        flushes: what the flush does from now on.
        hurt: a call to resume it was made to fail.
    """

    def __init__(self, world: World, index: int, held: str) -> None:
        self.world, self.index, self.name = world, index, f"engine {index}"
        self.url = f"http://{index}"
        self.paused, self.label, self.hurt = False, held, False
        self.member: Member | None = None
        self.life = 0
        self.attached: Future[None] | None = None
        self.hangs = False
        self.flushes = ""
        self.flushed = ""
        self.ranks = [Rank(world, self, number, held) for number in range(RANKS)]
        self.info = _INFO
        self.hook = SimpleNamespace(
            ckpt_ready=self._ready,
            ckpt_pause=self._pause,
            ckpt_attach=lambda endpoint, rendezvous: None,
            ckpt_flush_cache=self._flush,
            ckpt_resume=self._resume,
        )

    def has(self, _hook: str) -> bool:
        """As a plugin."""
        return True

    @property
    def instance(self) -> str:
        """Which life."""
        return f"{self.name}, life {self.life}"

    @property
    def restarted(self) -> bool:
        """Since the controller looked at it last."""
        status = self.member.status if self.member is not None else None
        return status is not None and status.instance_id != self.instance

    @property
    def fresh(self) -> bool:
        """It serves what it started with, whatever became of an update."""
        return not self.alive or self.held == "start"

    @property
    def alive(self) -> bool:
        """All its processes are."""
        return all(rank.alive for rank in self.ranks)

    @property
    def held(self) -> str:
        """The version that all ranks hold, or MIXED."""
        versions = {rank.held for rank in self.ranks}
        return versions.pop() if len(versions) == 1 else MIXED

    @property
    def state(self) -> EndpointState:
        """What its server says."""
        if not self.alive:
            return EndpointState.DEAD
        if any(rank.stage != "out" for rank in self.ranks):
            return EndpointState.UPDATING
        if any(rank.armed for rank in self.ranks):
            return EndpointState.POISONED
        return EndpointState.PAUSED if self.paused else EndpointState.SERVING

    def choice(self, what: str, *options: str) -> str:
        """What this one does now; the controller may be killed before."""
        self.world.step(f"{self.name}: {what}", "kill")
        return self.world.chooser.choose(f"{self.name}: {what}", *options)

    def restart(self) -> None:
        """Another life, with the weights that it starts with, and it serves."""
        if self.attached is not None and not self.attached.done():
            self.attached.set_exception(EngineUnavailable("connection reset"))
        for rank in self.ranks:
            rank.alive, rank.stage = False, "out"
        self.life += 1
        self.paused, self.hangs, self.flushes = False, False, ""
        self.ranks = [Rank(self.world, self, number, "start") for number in range(RANKS)]
        self.label = "start"

    def rank_left(self) -> None:
        """The attach call comes back with the last of them."""
        waits = not self.hangs and self.attached is not None and not self.attached.done()
        if waits and all(rank.stage == "out" for rank in self.ranks):
            self.attached.set_result(None)

    def rank_died(self) -> None:
        """It comes back at once."""
        if self.attached is not None and not self.attached.done():
            self.attached.set_exception(EngineUnavailable("connection reset"))

    # -- hooks ---------------------------------------------------------------------------------------------------
    def _answer(self, what: str, *options: str) -> str:
        picked = self.choice(what, "ok", "no answer", "restart", *options)
        if picked == "restart":
            self.restart()
        if picked == "no answer" or (picked == "restart" and what != "ready") or not self.alive:
            raise EngineUnavailable(f"{self.name} does not answer")
        return picked

    def _ready(self, endpoint: object) -> EndpointStatus:
        self._answer("ready")
        return EndpointStatus(
            engine="toy", state=self.state, world_size=RANKS, device_kind=DeviceKind.CUDA, instance_id=self.instance,
            version=self.label, device_uuids=_DEVICES,
        )  # fmt: skip

    def _pause(self, endpoint: object, mode: PauseMode) -> int:
        picked = self._answer("pause", "done, no answer")
        self.paused = True
        self.world.pauses += 1
        if picked == "done, no answer":
            raise EngineUnavailable(f"{self.name} does not answer")
        return 1

    def attach(self, rendezvous: Rendezvous) -> Future[None]:
        """The blocking call, begun."""
        self.attached = call = Future()
        match self.choice("attach", "ok", "raises", "comes back early", "never comes back"):
            case "raises":
                call.set_exception(EngineUnavailable("refused"))
                return call
            case "comes back early":
                call.set_result(None)
                return call
            case "never comes back":
                self.hangs = True
        if not self.alive:
            call.set_exception(EngineUnavailable("dead"))
            return call
        for rank in self.ranks:
            if rank.alive and rank.stage == "out":
                rank.attach(rendezvous)
        return call

    def _flush(self, endpoint: object) -> None:
        if not self.flushes:
            self.flushes = self._answer("flush", "busy once", "busy for ever")
        if self.flushes.startswith("busy"):
            if self.flushes == "busy once":
                self.flushes = "ok"
            raise EngineError(f"{self.name} is busy")
        self.flushed = self.held

    def _resume(self, endpoint: object, version: str | None) -> None:
        restarted = self.restarted
        try:
            picked = self._answer("resume", "done, no answer")
        except EngineUnavailable:
            self.hurt = True
            raise
        if restarted:
            self.world.violated(f"{self.name} was restarted and is resumed by the update ({version})")
        self.paused = False
        self.label = version or self.label
        self.world.check_resumed(self, version)
        if picked == "done, no answer":
            self.hurt = True
            raise EngineUnavailable(f"{self.name} does not answer")


class World:
    """All of one run.

    Attributes:
        killed: the controller is gone.
        life: which controller it is.
        outbox: what peers said and the controller has not heard.
        violations: of the invariants.
    """

    def __init__(self, chooser: Chooser, digests: dict[str, str], versions: dict[str, str]) -> None:
        self.chooser = chooser
        self.killed, self.life = False, 1
        self.now = 1000.0
        self.pauses = 0
        self.violations: list[str] = []
        self.outbox: list[tuple[bytes, wire.AnyMessage]] = []
        self.tokens: set[str] = set()
        self.agent_plans: dict[int, str] = {}
        self._by_path, self._versions = digests, versions
        self._pids: dict[int, Actor] = {}
        self._peers: dict[bytes, tuple[Actor, str]] = {}
        self._numbers = itertools.count(1)
        self.agents: list[Agent] = []
        self.engines = [Engine(self, index, "A") for index in range(ENGINES)]

    # -- what actors ask -----------------------------------------------------------------------------------------
    def new_pid(self, actor: Actor) -> int:
        """A process."""
        self._pids[number := next(self._numbers)] = actor
        return number

    def new_peer(self, actor: Actor, token: str) -> bytes:
        """A connection."""
        self._peers[peer := b"%06d" % next(self._numbers)] = (actor, token)
        return peer

    def process(self, pid: int) -> wire.ProcessInfo:
        """Where it runs."""
        spaces = {"pid_namespace": "p", "ipc_namespace": "i", "net_namespace": "n"}
        return wire.ProcessInfo(boot_id="b", pid=pid, uid=1, host="h", **spaces)

    def is_dead(self, pid: int) -> bool:
        """Whether a process is gone."""
        return not self._pids[pid].alive

    def digest_in(self, index: SourceIndex) -> str:
        """Of the tensor of a checkpoint."""
        return self._by_path[index.files[0].path]

    def version_of(self, digest: str) -> str:
        """The name of that content."""
        return self._versions.get(digest, "of no version")

    def spawn(self, config: Any) -> Agent:
        """An agent process."""
        self.step("spawn an agent")
        self.agents.append(agent := Agent(self, config))
        return agent

    # -- steps of the controller ---------------------------------------------------------------------------------
    def step(self, label: str, *kinds: str) -> None:
        """Before something that the controller does: it may be interrupted, or killed."""
        if self.killed:
            raise Killed
        picked = self.chooser.choose(f"before: {label}", "go on", *(kinds or ("interrupt", "kill")))
        if picked == "interrupt":
            raise KeyboardInterrupt
        if picked == "kill":
            self.killed = True
            raise Killed

    def send(self, peer: bytes, message: wire.AnyMessage) -> None:
        """From the controller."""
        if isinstance(message, wire.Ping):
            return
        actor, token = self._peers[peer]
        self.step(f"{type(message).__name__} to {actor.name}")
        if actor.alive and peer == actor.peer and token in self.tokens:
            actor.inbox.append(message)

    def receive(self) -> list[tuple[bytes, wire.AnyMessage]]:
        """What peers say; where nothing comes, time passes."""
        self.step("hear")
        self.run()
        heard = [(peer, message) for peer, message in self.outbox if self._peers[peer][1] in self.tokens]
        self.outbox.clear()
        if not heard:
            self.now += 700.0
        return heard

    def run(self) -> None:
        """All actors do what they can."""
        while sum(actor.work() for actor in self.actors()) or self._finish():
            self.check()
        self.check()

    def actors(self) -> list[Actor]:
        """All processes."""
        return [*self.agents, *(rank for engine in self.engines for rank in engine.ranks)]

    def _finish(self) -> bool:
        """Ranks verify when all agents have sent."""
        alive = [agent for agent in self.agents if agent.alive and agent.token == self.agents[-1].token]
        if not alive or not all(agent.sent for agent in alive):
            return False
        ready = [rank for engine in self.engines for rank in engine.ranks if rank.stage == "loading" and not rank.stuck]
        for rank in ready:
            rank.finish()
        return bool(ready)

    # -- what people do ------------------------------------------------------------------------------------------
    def bury(self) -> None:
        """The controller's agents end with it, its ranks hear nothing any more; whatever was stopped goes on."""
        self.life += 1
        self.killed = False
        self.tokens.clear()
        self.wake()
        for engine in self.engines:
            for rank in engine.ranks:
                rank.silence()
        for agent in self.agents:
            agent.exit()
        self.run()
        self.outbox.clear()

    def wake(self) -> None:
        """Whatever was stopped goes on, finds what it was sent, and then hears nothing."""
        stopped = [actor for actor in self.actors() if actor.stuck and actor.alive]
        for actor in stopped:
            actor.stuck = False
            if isinstance(actor, Rank) and actor.stage == "late":
                actor.dial()
        self.run()
        for actor in stopped:
            if isinstance(actor, Rank):
                actor.silence()
        self.run()

    def repair(self) -> None:
        """Restart what is dead or hangs."""
        for engine in self.engines:
            if not engine.alive or (engine.attached is not None and not engine.attached.done()):
                engine.restart()
            engine.flushes = ""

    # -- invariants ----------------------------------------------------------------------------------------------
    def violated(self, text: str) -> None:
        """Remember it."""
        self.violations += [text] if text not in self.violations else []

    def check(self) -> None:
        """Never routable when mixed."""
        for engine in self.engines:
            if engine.paused or not engine.alive:
                continue
            if engine.held == MIXED:
                self.violated(f"{engine.name} serves with ranks that hold {[rank.held for rank in engine.ranks]}")
            elif engine.label != engine.held:
                self.violated(f"{engine.name} serves {engine.held} as {engine.label}")
            for rank in engine.ranks:
                if rank.held not in ("A", "start") and rank.held not in rank.commits:
                    self.violated(f"{engine.name} serves {rank.held}, which {rank.name} has not committed")

    def check_resumed(self, engine: Engine, version: str | None) -> None:
        """Published implies verified, on every rank of every engine that lives on."""
        self.check()
        if version == "B":
            for other in self.engines:
                whole = other.fresh or all("B" in rank.commits for rank in other.ranks)
                if not whole:
                    self.violated(f"{engine.name} is resumed with B, which {other.name} has not committed")
            if engine.flushed != "B":
                self.violated(f"{engine.name} is resumed with B and a cache of {engine.flushed or 'A'}")

    def print(self, notes: Mapping[str, Hashable]) -> Hashable:
        """All that the rest of the run depends on; which engine and which of its ranks it is makes no difference.

        Args:
            notes: what the controller knows of each engine, by URL.
        """
        engines = tuple(sorted(repr((_engine_print(engine), notes.get(engine.url))) for engine in self.engines))
        agents = sorted((a.alive, a.stuck, a.ring, a.sent, _kinds(a.inbox)) for a in self.agents if a.alive or a.ring)
        said = sorted((type(self._peers[peer][0]).__name__, type(message).__name__) for peer, message in self.outbox)
        return engines, tuple(agents), tuple(said), bool(self.tokens)


def _engine_print(e: Engine) -> Hashable:
    call = None if e.attached is None else e.attached.done()
    ranks = sorted(repr(_rank_print(rank)) for rank in e.ranks)
    return e.life > 0, e.paused, e.label, e.hangs, e.flushes, e.restarted, e.hurt, e.flushed, call, ranks


def _rank_print(rank: Rank) -> Hashable:
    return rank.alive, rank.stuck, rank.held, rank.stage, rank.armed, sorted(rank.commits), _kinds(rank.inbox)


def _kinds(messages: list[wire.AnyMessage]) -> tuple[str, ...]:
    return tuple(type(message).__name__ for message in messages)
