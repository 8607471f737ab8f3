"""Two engines that live through many cases, and what is asked of them from outside."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from ckpt_conformance.reference.launch import ReferenceServer
from ckpt_core import Outcome, Target, UpdateConfig, Updater
from ckpt_core.shm import remove_directory

HERE = Path(__file__).parent
INSTANCES = 2
TP = 2
SETTLES_WITHIN_S = 20.0
PLAN = {"ring_bytes": 12288, "bucket_bytes": 12288}  # an agent's second bucket waits for room
Digests = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all cases share.

    Attributes:
        a, b: two checkpoints of one model.
        digests: of live tensors by rank, of fresh starts on A and on B.
        root: for sockets and control files.
        memory: for shared memory.
    """

    a: str
    b: str
    digests: dict[str, Digests]
    root: str
    memory: str


@dataclass(slots=True, kw_only=True)
class Found:
    """One engine after a case.

    Attributes:
        alive: all of its processes run.
        state: before anybody else resumed it.
        holds: "A", "B", "mixed" or "?" where nobody can tell.
        serves: it makes tokens once somebody resumed it.
        version: that it names then.
    """

    url: str
    alive: bool
    state: str = "gone"
    holds: str = "?"
    serves: bool = False
    version: str = ""


class Stage:
    """Servers on A, kept over cases; what a case killed is started again."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.control = _made(Path(world.root) / f"{number}-control")
        self.memory = _made(Path(world.memory) / f"{number}-memory")
        self.sockets = _made(Path(world.root) / f"{number}-sockets")
        # the updates that mend have folders of their own: what is left in the others was left by a case
        os.environ["CKPT_SHM_DIR"] = str(_made(Path(world.memory) / f"{number}-mend"))
        os.environ["CKPT_SOCKET_DIR"] = str(_made(Path(world.root) / f"{number}-mend"))
        os.environ["CKPT_STATE_DIR"] = str(_made(Path(world.root) / f"{number}-state"))  # all know what engines run
        self.log = self.control / "log.jsonl"
        self.servers: list[ReferenceServer] = []
        self._updaters: dict[str, Updater] = {}
        self._controllers: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stage:
        with (self.control / "errors.txt").open("a") as errors:
            self._controllers = subprocess.Popen(
                [sys.executable, str(HERE / "controller.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self._environment(),
            )
        self.servers = [self._server(instance) for instance in range(INSTANCES)]
        self._start(range(INSTANCES))
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_updaters()
        for server in self.servers:
            server.__exit__(None, None, None)
        if self._controllers is not None:
            self._controllers.communicate()

    # -- for a case --------------------------------------------------------------------------------------------------
    def begin(self, job: dict[str, object]) -> None:
        """Start a controller."""
        assert self._controllers is not None
        assert self._controllers.stdin is not None
        self._controllers.stdin.write(json.dumps({**job, "report": str(self.control / "report.json")}).encode() + b"\n")
        self._controllers.stdin.flush()

    def ended(self, within_s: float) -> bool:
        """Whether the controller ends in time."""
        assert self._controllers is not None
        assert self._controllers.stdout is not None
        return bool(select.select([self._controllers.stdout], [], [], within_s)[0])

    def outcome(self) -> dict[str, Any] | None:
        """What an ended controller was told about its update, if it lived to tell."""
        assert self._controllers is not None
        assert self._controllers.stdout is not None
        self._controllers.stdout.readline()
        report = self.control / "report.json"
        return json.loads(report.read_text()) if report.exists() else None

    @property
    def controller_pid(self) -> int:
        """Of the controller, once its session began."""
        return int((self.control / "pid-controller-0-0").read_text())

    def errors(self) -> str:
        """The end of what controllers and agents wrote to standard error."""
        return (self.control / "errors.txt").read_text()[-800:]

    def _environment(self) -> dict[str, str]:
        """Of controllers under test, and so of their agents."""
        mine = {
            "CKPT_SHM_DIR": str(self.memory),
            "CKPT_SOCKET_DIR": str(self.sockets),
            "CKPT_FAULTS": str(self.control),
        }
        return {**os.environ, **mine, "PYTHONPATH": _python_path()}

    def arm(self, fault: dict[str, object]) -> None:
        """Forget the last case, and let the fault of this one wait for its trigger."""
        for path in self.control.iterdir():
            if not path.name.startswith(("pid-worker", "pid-server", "errors")):
                path.unlink()
        os.truncate(self.control / "errors.txt", 0)
        self.log.touch()
        draft = self.control / "draft.json"
        draft.write_text(json.dumps(fault))
        draft.rename(self.control / "armed.json")

    def disarm(self) -> None:
        """Whatever did not happen will not happen any more."""
        for name in ("armed.json", "fail-server-0-0"):
            (self.control / name).unlink(missing_ok=True)

    def events(self, event: str) -> list[dict[str, object]]:
        """What processes under test noted of that kind."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def remains(self) -> list[str]:
        """Shared memory, sockets and agents of the case that are still there."""
        left = [*self.memory.iterdir(), *self.sockets.iterdir()]
        kept = ("ckpt-locks-", "ckpt-versions-")
        return [path.name for path in left if not path.name.startswith(kept)] + self._agents()

    def _agents(self) -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "ckpt_core.agent" not in (process.info["cmdline"] or []):
                continue
            with suppress(psutil.Error):
                mine = process.environ().get("CKPT_SHM_DIR") == str(self.memory)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"agent {process.pid}")
        return found

    # -- what engines hold -------------------------------------------------------------------------------------------
    def settled(self) -> bool:
        """Whether every engine that lives is done with the update, and answers."""
        return all(_state(server) not in ("updating", "silent") for server in self.servers if lives(server))

    def look(self) -> list[Found]:
        """Ask every engine what it holds; resume it, as an operator may at any time; see whether it makes tokens."""
        return [self._look(server) for server in self.servers]

    def _look(self, server: ReferenceServer) -> Found:
        found = Found(url=server.url, alive=lives(server), state=_state(server))
        if not found.alive:
            return found
        with httpx.Client(base_url=server.url, trust_env=False, timeout=10.0) as client, suppress(httpx.HTTPError):
            answer = client.get("/live_digests")
            found.holds = self._named(answer.json()["ranks"]) if answer.is_success else "?"
            client.post("/resume")
            body = {"prompt_token_ids": [5, 17], "max_tokens": 2}
            found.serves = client.post("/generate", json=body).status_code == 200
            found.version = client.get("/status").json()["version"]
        return found

    def _named(self, digests: Digests) -> str:
        return next((name for name, known in self.world.digests.items() if known == digests), "mixed")

    # -- afterwards --------------------------------------------------------------------------------------------------
    def replace_dead(self) -> None:
        """Start again what a case killed, and nothing else; at the same address."""
        dead = [instance for instance, server in enumerate(self.servers) if not lives(server)]
        for instance in dead:
            port = self.servers[instance].url.rpartition(":")[2]
            self.servers[instance].__exit__(None, None, None)
            self.servers[instance] = self._server(instance, f"--port={port}")
        self._start(dead)

    def mend(self) -> None:
        """By another controller to B and back to A.

        Raises:
            Exception: whatever the updates raise; AssertionError where they did not bring what they say.
        """
        if not self._updaters:
            # loaders are watched only where every value changes, so that all is replayed in the next case: its plan depends on it
            self._updaters = {"B": self._updater(replay=False), "A": self._updater(replay=True)}
        for name, checkpoint in (("B", self.world.b), ("A", self.world.a)):
            report = self._updaters[name].update(checkpoint, version=name)
            assert report.outcome is Outcome.COMMITTED, report.outcome
            for server in self.servers:
                held = self._named(server.live_digests())
                status = server.status()
                assert held == name, f"after an update to {name} {server.url} holds {held}"
                assert status["state"] == "serving", f"after an update to {name} {server.url} is {status}"
                assert status["version"] == name, f"after an update to {name} {server.url} is {status}"

    def start_over(self) -> None:
        """After a case that left engines which no update mends."""
        self._close_updaters()
        for server in self.servers:
            server.__exit__(None, None, None)
        self.servers = [self._server(instance) for instance in range(INSTANCES)]
        self._start(range(INSTANCES))
        self.mend()

    def _updater(self, *, replay: bool) -> Updater:
        targets = [Target(engine="reference", url=server.url) for server in self.servers]
        deadlines = {f"{name}_timeout_s": 30.0 for name in ("attach", "transfer", "pause")}
        return Updater(targets, config=UpdateConfig(**PLAN, **deadlines, replay=replay)).__enter__()

    def _close_updaters(self) -> None:
        updaters, self._updaters = self._updaters, {}
        for updater in updaters.values():
            updater.__exit__(None, None, None)

    def _server(self, instance: int, *extra: str) -> ReferenceServer:
        variables = {
            "CKPT_FAULTS": str(self.control),
            "CKPT_FAULT_INSTANCE": str(instance),
            "PYTHONPATH": _python_path(),
        }
        prefix = ("env", *(f"{name}={value}" for name, value in variables.items()))
        return ReferenceServer(self.world.a, tp=TP, version="A", prefix=prefix, extra=extra)

    def _start(self, instances: Sequence[int]) -> None:
        """All at once."""
        servers = [self.servers[instance] for instance in instances]
        with ThreadPoolExecutor() as threads:
            for started in [threads.submit(server.__enter__) for server in servers]:
                started.result()
        for instance, server in zip(instances, servers, strict=True):
            names = {server.pid: f"server-{instance}-0"}
            names |= {pid: f"worker-{instance}-{rank}" for rank, pid in enumerate(server.rank_pids)}
            for pid, name in names.items():
                (self.control / f"pid-{name}").write_text(str(pid))


def eventually(holds: Callable[[], bool], within_s: float = SETTLES_WITHIN_S) -> bool:
    """Whether something comes true within a deadline."""
    deadline, pause = time.monotonic() + within_s, threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.02)
    return True


def lives(server: ReferenceServer) -> bool:
    """Whether all processes of an engine run."""
    return all(_runs(pid) for pid in server.pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _state(server: ReferenceServer) -> str:
    try:
        return str(httpx.get(f"{server.url}/status", trust_env=False, timeout=2.0).json()["state"])
    except httpx.HTTPError:
        return "silent"


def _python_path() -> str:
    """Faults first, then what this process was told."""
    return os.pathsep.join(path for path in (str(HERE / "inject"), os.environ.get("PYTHONPATH", "")) if path)


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def clean(world: World) -> None:
    """Remove what all stages wrote."""
    for path in (world.root, world.memory):
        remove_directory(Path(path))
