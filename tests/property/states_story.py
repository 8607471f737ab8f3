"""One run: an update to B, whatever happens to it, what people do then, and what must be true."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from states_driver import Controller, Lab, attempt
from states_explorer import Chooser, Point, Script, told
from states_world import MIXED, Engine

from ckpt_core.config import UpdateConfig
from ckpt_core.contract import EndpointState
from ckpt_core.errors import CkptError, Outcome, UpdateAborted
from ckpt_core.metrics import UpdateReport
from ckpt_core.outcomes import worst

_HELD = {Outcome.CLEAN: "A", Outcome.RESTORED: "A", Outcome.COMMITTED: "B"}


class Story:
    """Runs of one configuration in one lab.

    Attributes:
        outcomes: how often runs ended in what.
        found: violations of the last run.
    """

    def __init__(self, lab: Lab, config: UpdateConfig, *, known_plan: bool = False) -> None:
        self._lab, self._config, self._known_plan = lab, config, known_plan
        self._followed: set[Hashable] = set()
        self.outcomes: dict[str, int] = {}
        self.found: list[str] = []
        self.result: Any = None

    def run(self, script: Script) -> list[Point]:
        """Replay it; what could have happened."""
        chooser = Chooser(script=dict(script))
        self.world = self._lab.begin(chooser)
        self._controller = controller = self._new()
        if self._known_plan:
            self._lab.recall(controller)
        self.result = result = attempt(lambda: controller.update("B", version="B"))
        kind = type(result).__name__
        if isinstance(result, UpdateAborted):
            kind = result.outcome.value
        if self.world.killed:
            kind = self._recovered()
        else:
            self._check_end(result)
        self._settle()
        self._follow()
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1
        self.found = self.world.violations
        return chooser.points

    def explain(self, script: Script, points: list[Point]) -> str:
        """For people."""
        causes = [repr(cause) for cause in getattr(self.result, "causes", ())]
        return f"{told(script, points)}\n    {self.found}\n    {self.result!r} {causes}\n    {script}"

    def _new(self) -> Controller:
        return Controller(self._lab, self._config)

    def _say(self, text: str) -> None:
        self.world.violated(text)

    # -- the end of an update ------------------------------------------------------------------------------------
    def _check_end(self, result: Any) -> None:
        self.world.check()
        match result:
            case UpdateReport():
                self._check_committed()
            case UpdateAborted():
                self._check_aborted(result)
            case CkptError() | KeyboardInterrupt():
                self._check_error(result)
            case _:
                self._say(f"no outcome: {result!r}")
        if any(agent.ring and not agent.stuck for agent in self.world.agents):
            self._say("rings are not given back")
        self._check_talk()
        if self._lab.history.store.in_flight():
            self._say("an update stays in flight")
        self._check_store()

    def _check_committed(self) -> None:
        for engine in self.world.engines:
            if engine.fresh:
                continue
            if engine.held != "B" or not all("B" in rank.commits for rank in engine.ranks):
                self._say(f"reported as committed, but {engine.name} holds {engine.held}")
            if engine.paused and not engine.hurt:
                self._say(f"reported as committed, but {engine.name} does not serve")

    def _check_aborted(self, aborted: UpdateAborted) -> None:
        by_endpoint = aborted.by_endpoint
        if set(by_endpoint) != {engine.url for engine in self.world.engines}:
            self._say(f"outcomes of {sorted(by_endpoint)}")
        if aborted.outcome is not worst(by_endpoint.values()):
            self._say(f"{aborted.outcome} is not the worst of {by_endpoint}")
        if aborted.outcome is Outcome.COMMITTED or not aborted.causes:
            self._say(f"aborted, and yet {aborted.outcome} by {aborted.causes}")
        for engine in self.world.engines:
            if not engine.fresh:
                self._check_outcome(engine, by_endpoint[engine.url])

    def _check_outcome(self, engine: Engine, outcome: Outcome) -> None:
        if outcome is Outcome.POISONED:
            if not engine.paused:
                self._say(f"{engine.name} is poisoned and serves")
            return
        if engine.held != _HELD[outcome]:
            self._say(f"{engine.name} is {outcome.value}, but holds {engine.held}")
        if outcome is not Outcome.COMMITTED and engine.paused and not engine.hurt:
            self._say(f"{engine.name} is {outcome.value}, but does not serve")

    def _check_error(self, error: BaseException) -> None:
        """Before the pause, or after the commit."""
        if self.world.pauses == 0:
            return
        said = isinstance(error, KeyboardInterrupt) or "is committed on every rank" in str(error)
        whole = all(engine.fresh or all("B" in rank.commits for rank in engine.ranks) for engine in self.world.engines)
        if not (said and whole):
            self._say(f"no outcome of what was paused: {error!r}")

    def _check_talk(self) -> None:
        talk, agents = self._controller._talk, self._controller._agents
        peers = set(agents.peers) if agents is not None else set()
        if left := set(talk._names) - peers:
            names = [talk._names[peer] for peer in left]
            self._say(f"the controller still talks to {sorted(names)}")
        if talk._farewell is not None and self.world.pauses:
            self._say("the controller still turns ranks away")
        if talk.watches:
            self._say("watches are left")

    def _check_store(self) -> None:
        """Published implies verified."""
        for engine in self.world.engines:
            record = self._lab.history.ran(engine.url, engine.instance)
            if record is not None and record.version == "B" and not all("B" in rank.commits for rank in engine.ranks):
                self._say(f"B is recorded of {engine.name}, which has not committed it")

    # -- a controller that was killed ----------------------------------------------------------------------------
    def _recovered(self) -> str:
        self.world.bury()
        self.world.repair()
        self._controller = self._new()
        begun = bool(self._lab.history.left_behind())
        self.world.chooser.enter("recover", self._lab.state())
        result = attempt(self._controller.recover)
        if self.world.killed or isinstance(result, BaseException):
            result = self._recovered_at_last()
        self.result = result
        if isinstance(result, BaseException):
            self._say(f"not recovered: {result!r}")
            return "not recovered"
        if self._lab.history.store.in_flight():
            self._say("an update stays in flight after recover")
        if set(result) != ({engine.url for engine in self.world.engines} if begun and result else set()):
            self._say(f"recovered {result}")
        self._check_recovered(result)
        self._check_store()
        return "killed, " + (worst(result.values()).value if result else "nothing to recover")

    def _recovered_at_last(self) -> Any:
        """Once more, and nothing happens."""
        self.world.chooser.closed = True
        self.world.bury()
        self.world.repair()
        self._controller = self._new()
        return attempt(self._controller.recover)

    def _check_recovered(self, found: dict[str, Outcome]) -> None:
        for engine in self.world.engines:
            if engine.url in found and not engine.fresh:
                self._check_outcome(engine, found[engine.url])
        served = {e.held for e in self.world.engines if not e.fresh and not e.paused}
        if len(served) > 1:
            self._say(f"after recovery engines serve {sorted(served)}")

    # -- afterwards ----------------------------------------------------------------------------------------------
    def _settle(self) -> None:
        """Whatever was stopped goes on, what died is restarted."""
        self.world.chooser.closed = True
        self.world.wake()
        for engine in self.world.engines:
            if any(rank.alive and rank.stage != "out" for rank in engine.ranks):
                self._say(f"a rank of {engine.name} is still attached")
        self.world.repair()
        self.world.check()

    def _follow(self) -> None:
        """A good update of what survived, once from each state."""
        key = self._lab.state({m.endpoint.url: m.paused_here for m in self._controller._fleet.members})
        if key in self._followed or self.world.violations:
            return
        self._followed.add(key)
        stays = [
            engine.state is EndpointState.PAUSED and not member.paused_here
            for engine, member in zip(self.world.engines, self._controller._fleet.members, strict=True)
        ]
        result = attempt(lambda: self._controller.update("C", version="C"))
        if not isinstance(result, UpdateReport):
            self._say(f"the next update fails: {result!r}")
            return
        for engine, paused in zip(self.world.engines, stays, strict=True):
            if engine.held != "C" or engine.held == MIXED or (engine.paused and not paused):
                self._say(f"after the next update {engine.name} holds {engine.held}, paused: {engine.paused}")
