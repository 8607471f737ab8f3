"""The real controller (Updater, Session, Conversation, Boarding, AgentGroup, History, Store) in a scripted world."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from states_actors import Agent
from states_explorer import Chooser
from states_world import RANKS, Killed, World

from ckpt_core import agents, api, conversation, fleet, process, wire
from ckpt_core.config import Environment, UpdateConfig
from ckpt_core.conversation import Conversation
from ckpt_core.endpoint import Endpoint
from ckpt_core.errors import UpdateAborted
from ckpt_core.fleet import Fleet, Member
from ckpt_core.history import History
from ckpt_core.manifest import Manifest
from ckpt_core.session import Session
from ckpt_core.source import SourceIndex, open_checkpoint
from ckpt_core.store_file import StoreFile

_DIGESTS = {"A": "aa" * 16, "B": "bb" * 16, "C": "cc" * 16}
_TABLES = ("versions", "labels", "engines", "updates")


class Hub:
    """Stands in for channel.Hub."""

    address, server_key = "nowhere", ""

    def __init__(self, world: World) -> None:
        self._world = world

    def allow(self, token: str) -> None:
        """See channel.Hub."""
        self._world.tokens.add(token)

    def revoke(self, token: str) -> None:
        """See channel.Hub."""
        self._world.tokens.discard(token)

    def forget(self, peers: object) -> None:
        """See channel.Hub."""

    def token_of(self, peer: bytes) -> str:
        """See channel.Hub."""
        return self._world._peers[peer][1]

    def send(self, peer: bytes, message: wire.AnyMessage) -> None:
        """See channel.Hub."""
        self._world.send(peer, message)

    def receive(self, _timeout_s: float) -> list[tuple[bytes, wire.AnyMessage]]:
        """See channel.Hub."""
        return self._world.receive()


class Deaths:
    """Stands in for process.DeathWatch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._names: dict[str, int] = {}

    def add(self, info: wire.ProcessInfo, name: str) -> None:
        """See DeathWatch."""
        self._names[name] = info.pid

    def drop(self, name: str) -> None:
        """See DeathWatch."""
        self._names.pop(name, None)

    def dead(self) -> list[str]:
        """See DeathWatch."""
        return sorted(name for name, pid in self._names.items() if self._world.is_dead(pid))


class Threads:
    """Stands in for ThreadPoolExecutor: one call after the other. What ends the controller ends all."""

    def __init__(self, *_size: int, **_options: str) -> None:
        pass

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call now."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 whoever asks the future gets it
            future.set_exception(error)
        return future


class Controller(api.Updater):
    """An Updater without sockets and processes."""

    def __init__(self, lab: Lab, config: UpdateConfig) -> None:
        world = lab.world
        self._config, self._cluster, self._agents, self._known_plan = config, None, None, None
        self._on_progress = lambda *_told: None
        self._environment = Environment(socket_root=lab.directory, memory_root=lab.directory)
        self._lab = lab
        members = [Member(endpoint=Endpoint(url=e.url, engine="toy"), plugin=e) for e in world.engines]  # type: ignore[arg-type]
        self._fleet = Fleet(members=members)
        for engine, member in zip(world.engines, members, strict=True):
            engine.member = member
        self._hub = Hub(world)  # type: ignore[assignment]
        self._talk = Conversation(self._hub, ping_every_s=4.0)  # type: ignore[arg-type]
        self.__dict__ |= {"history": lab.history, "_sockets": lab.directory, "_memory": lab.directory, "_limits": None}

    def _index(self, checkpoint: Any) -> Any:
        return nullcontext(self._lab.indexes[checkpoint])


class Lab:
    """What is made once for all runs: checkpoints and a store that knows that all engines run A.

    Attributes:
        world: of the present run.
        history: of all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o700)
        self.indexes: dict[str, SourceIndex] = {}
        self.digests: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        for name, digest in _DIGESTS.items():
            save_file({"w": np.zeros((2, 2), dtype=np.float32)}, directory / f"{name}.safetensors")
            self.indexes[name] = index = open_checkpoint(directory / f"{name}.safetensors")
            self.digests[index.files[0].path] = digest
            self.versions[Manifest.from_index(index, {"w": digest}).digest] = name
        self.history = History(directory / "state", directory / "pool")
        self.known_plan: Any = None
        self.plan_digest = ""
        self._rows: dict[str, list[Any]] = {}
        self._file = self.history.store._file
        self._file._connection.execute("PRAGMA synchronous = OFF")  # no power cuts here
        self.world = self._new(Chooser(closed=True))

    def start(self) -> None:
        """The update to A that all runs begin after."""
        controller = Controller(self, UpdateConfig())
        controller.update("A", version="A")
        self.known_plan = controller._known_plan
        self.plan_digest = self.known_plan.plan.plans[0].digest
        self._rows = {table: self._file._connection.execute(f"SELECT * FROM {table}").fetchall() for table in _TABLES}  # noqa: S608

    def begin(self, chooser: Chooser) -> World:
        """Another run."""
        connection = self._file._connection
        connection.execute("BEGIN")
        for table in reversed(_TABLES):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608
        for table, rows in self._rows.items():
            for row in rows:
                connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
        connection.execute("COMMIT")
        self.world = self._new(chooser)
        return self.world

    def recall(self, controller: Controller) -> None:
        """Let all know the plan of the update before."""
        controller._known_plan = self.known_plan
        self.world.agent_plans = dict.fromkeys(range(RANKS), self.plan_digest)
        for engine in self.world.engines:
            for rank in engine.ranks:
                rank.plan = self.plan_digest

    def _new(self, chooser: Chooser) -> World:
        return World(chooser, self.digests, self.versions)

    def state(self, notes: Mapping[str, Any] | None = None) -> Any:
        """What the world is and the store says, without names and times."""
        store, noted = self.history.store, dict(notes or {})
        for engine in self.world.engines:
            record = store.engine(engine.url)
            known = record and (record.version, record.instance_id == engine.instance)
            noted[engine.url] = (known, noted.get(engine.url))
        flying = tuple((update.state, update.controller.is_gone()) for update in store.in_flight())
        return self.world.print(noted), flying


def install(lab: Lab, patch: pytest.MonkeyPatch) -> None:
    """Put the scripted world under the controller."""
    ticking = SimpleNamespace(monotonic=lambda: lab.world.now, sleep=lambda seconds: _sleep(lab, seconds))
    patch.setattr(conversation, "time", ticking)
    patch.setattr(fleet, "time", ticking)
    patch.setattr(fleet, "ThreadPoolExecutor", Threads)
    patch.setattr(fleet, "_in_thread", lambda call: _attach(lab, call))
    patch.setattr(fleet, "wait", lambda futures, timeout=None: _wait(lab, futures, timeout))
    patch.setattr(process, "current", lambda: lab.world.process(0))
    patch.setattr(process, "_start_ticks", lambda _pid: lab.world.life)
    patch.setattr(process, "DeathWatch", lambda _mine: Deaths(lab.world))
    patch.setattr(agents, "spawn", lambda config: lab.world.spawn(config))  # noqa: PLW0108 another world in each run
    patch.setattr(agents, "end", lambda children: _end(lab, children))
    patch.setattr(agents, "private_directory", lambda root, _prefix: root)
    patch.setattr(agents, "remove_directory", lambda _directory: None)
    patch.setattr(StoreFile, "transaction", _gated(lab, StoreFile.transaction))
    patch.setattr(Session, "_undo", _marked(lab, "undo", Session._undo, _undo_key))
    patch.setattr(Session, "_serve", _marked(lab, "serve", Session._serve, lambda session: ({}, session.version)))
    patch.setattr(api, "go_back", _marked(lab, "go back", api.go_back, _back_key))


def _sleep(lab: Lab, seconds: float) -> None:
    lab.world.now += 20 * max(1.0, seconds)


def _attach(lab: Lab, call: Any) -> Future[None]:
    engine = next(e for e in lab.world.engines if e.url == call.keywords["endpoint"].url)
    return engine.attach(call.keywords["rendezvous"])


def _wait(lab: Lab, futures: list[Future[Any]], timeout: float | None) -> Any:
    lab.world.step("wait for calls")
    lab.world.run()
    return SimpleNamespace(not_done=[future for future in futures if not future.done()])


def _end(lab: Lab, children: list[Agent]) -> None:
    if not lab.world.killed:
        for child in children:
            child.exit()


def _gated(lab: Lab, transaction: Any) -> Any:
    @contextmanager
    def gated(file: StoreFile) -> Iterator[Any]:
        lab.world.step("write to the store")
        with transaction(file) as connection:
            yield connection

    return gated


def _marked(lab: Lab, phase: str, call: Any, key: Any) -> Any:
    def marked(*arguments: Any) -> Any:
        if not lab.world.killed:
            notes, more = key(*arguments)
            lab.world.chooser.enter(phase, (lab.state(notes), more))
        return call(*arguments)

    return marked


def _undo_key(session: Session, error: BaseException) -> Any:
    notes: dict[str, list[str]] = {member.endpoint.url: [] for member in session._fleet.members}
    urls, talk = list(notes), session._talk
    for peer, hello in session._hellos.items():
        said = [type(message).__name__ for other, message in talk._inbox if other == peer]
        notes[urls[hello.endpoint_index]].append(f"{said} {peer in session._committed}")
    others = tuple(type(message).__name__ for peer, message in talk._inbox if peer not in session._hellos)
    return (
        {url: sorted(found) for url, found in notes.items()},
        (session.state, session.version, type(error), others, session._expect is None),
    )


def _back_key(aborted: UpdateAborted, *_rest: Any) -> Any:
    return {url: outcome.value for url, outcome in aborted.by_endpoint.items()}, None


def attempt(call: Callable[[], Any]) -> Any:
    """What it returns or raises."""
    try:
        return call()
    except (Exception, KeyboardInterrupt, Killed) as error:  # noqa: BLE001 looked into by the test
        return error
