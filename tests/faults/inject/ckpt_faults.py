"""Faults at exact points of processes under test, without a change of their code.

A control directory (CKPT_FAULTS) holds `armed.json`: who must reach which point, and what happens then to whom. Wrappers
around a few methods look there. Whoever finds its own name takes the file away, so that a fault strikes once, notes that
in `log.jsonl`, and then kills, stops or fails the victim: itself, or another process, and then it goes on only when the
victim felt it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CONTROL = Path(os.environ.get("CKPT_FAULTS", "/nonexistent"))
INSTANCE = os.environ.get("CKPT_FAULT_INSTANCE", "0")
FELT_WITHIN_S = 5.0
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
Call = Callable[..., Any]


class InjectedError(RuntimeError):
    """What a case of the matrix raises."""


# -- what a point does -----------------------------------------------------------------------------------------------
def reach(who: str, point: str) -> None:
    """Called wherever a fault can strike."""
    armed = CONTROL / "armed.json"
    try:
        fault = json.loads(armed.read_text())
        if fault["trigger"] != f"{who}:{point}":
            return
        os.rename(armed, CONTROL / "fired.json")  # only one gets it
    except FileNotFoundError:
        return
    if fault["then"] is not None:
        arm(CONTROL, fault["then"])
    _strike(who, fault)


def arm(control: Path, fault: dict[str, Any]) -> None:
    """Make a fault wait for its trigger; whole or not at all."""
    draft = control / "draft.json"
    draft.write_text(json.dumps(fault))
    draft.rename(control / "armed.json")


def note(event: str, **facts: object) -> None:
    """One line for the harness."""
    line = json.dumps({"event": event, "at": time.time(), **facts}) + "\n"
    with (CONTROL / "log.jsonl").open("a") as file:
        file.write(line)


def noted(event: str) -> bool:
    """Whether somebody noted that."""
    return f'"event": "{event}"' in (CONTROL / "log.jsonl").read_text()


def _strike(who: str, fault: dict[str, Any]) -> None:
    victim, kind = fault["victim"], fault["kind"]
    pid = os.getpid() if victim == who else int((CONTROL / f"pid-{victim}").read_text())
    note("primary" if fault["then"] is not None else "fired", victim=victim, pid=pid, kind=kind)
    if kind in _SIGNALS:
        os.kill(pid, _SIGNALS[kind])
        if victim != who:
            _await(lambda: _state(pid) in ("", "Z", "X") if kind == "kill" else _state(pid) == "T")
    elif victim == who:
        raise InjectedError("injected by the fault matrix")
    elif victim.startswith("controller"):
        os.kill(pid, signal.SIGINT)  # an exception that can really come anywhere
        _await(lambda: noted("undo"))
    else:
        (CONTROL / f"fail-{victim}").touch()
        _await(
            lambda: noted("attach failed") and noted("undo")
        )  # else the rest of the update may be faster than the news


def _await(felt: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FELT_WITHIN_S
    while not felt() and time.monotonic() < deadline:
        time.sleep(0.002)


def _state(pid: int) -> str:
    """Letter of the process state as /proc has it; "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _register(who: str) -> None:
    draft = CONTROL / f"draft-{who}"
    draft.write_text(str(os.getpid()))
    draft.rename(CONTROL / f"pid-{who}")


# -- where points are ------------------------------------------------------------------------------------------------
def _wrap(owner: Any, name: str, wrapper: Callable[[Call], Call]) -> None:
    """Fails where the method is gone: then the matrix must be told its new name."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def _before(owner: Any, name: str, who: Callable[[], str], point: str) -> None:
    def wrapper(original: Call) -> Call:
        def call(*args: Any, **options: Any) -> Any:
            reach(who(), point)
            return original(*args, **options)

        return call

    _wrap(owner, name, wrapper)


def _after(owner: Any, name: str, who: Callable[[], str], point: str) -> None:
    def wrapper(original: Call) -> Call:
        def call(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            reach(who(), point)
            return result

        return call

    _wrap(owner, name, wrapper)


class _Me:
    """The rank or agent that this process is, and how far it is."""

    name = ""
    buckets = 0
    counted = False
    committing = False


def _me() -> str:
    return _Me.name


def _controller() -> str:
    return "controller-0-0"


def _server() -> str:
    return f"server-{INSTANCE}-0"


def _session(module: ModuleType) -> None:
    session = module.Session

    def run(original: Call) -> Call:
        def call(self: Any) -> Any:
            _register(_controller())
            reach(_controller(), "IDLE")
            return original(self)

        return call

    def move(original: Call) -> Call:
        def call(self: Any, state: Any) -> Any:
            result = original(self, state)
            ended = state.name in ("CLEAN", "RESTORED", "POISONED")
            reach(_controller(), "END" if ended else state.name)
            return result

        return call

    def undo(original: Call) -> Call:
        def call(self: Any, error: BaseException) -> Any:
            note("undo", error=repr(error))
            reach(_controller(), "UNDO")
            return original(self, error)

        return call

    _wrap(session, "run", run)
    _wrap(session, "_move", move)
    _wrap(session, "_undo", undo)


def _fleet(module: ModuleType) -> None:
    _after(module.Fleet, "attach", _controller, "attach")
    _before(module.Fleet, "flush", _controller, "flush")
    _before(module.Fleet, "resume", _controller, "resume")


def _worker(module: ModuleType) -> None:
    attachment = module._Attachment

    def agree(original: Call) -> Call:
        def call(self: Any) -> Any:
            _Me.name, _Me.buckets, _Me.counted = f"worker-{INSTANCE}-{self._info.rank}", 0, False
            reach(_Me.name, "hello")
            return original(self)

        return call

    def commit(original: Call) -> Call:
        def call(self: Any) -> Any:
            _Me.committing = True
            try:
                return original(self)
            finally:
                _Me.committing = False

        return call

    def fingerprint(original: Call) -> Call:
        def call(*args: Any, **options: Any) -> Any:
            if not _Me.counted:  # what undoes an update may bring more
                note("buckets", count=_Me.buckets)
            _Me.counted = True
            reach(_Me.name, "verified")
            return original(*args, **options)

        return call

    _wrap(attachment, "_agree", agree)
    _wrap(attachment, "_commit", commit)
    _before(attachment, "_layout", _me, "layout")
    _before(attachment, "_take_rings", _me, "plan")
    _before(attachment, "_begin", _me, "begin")
    _wrap(attachment, "_fingerprint", fingerprint)


def _next_bucket() -> None:
    _Me.buckets += 1
    reach(_Me.name, f"b{_Me.buckets}")


def _counted(original: Call) -> Call:
    def call(*args: Any, **options: Any) -> Any:
        _next_bucket()
        return original(*args, **options)

    return call


def _apply(module: ModuleType) -> None:
    _wrap(module.Applier, "consume", _counted)


def _model(module: ModuleType) -> None:
    """The middle of the engine's finish: all that arrived was checked, nothing is marked as whole yet."""
    _before(module.CausalLM, "process_weights_after_loading", _me, "finish")


def _reference_worker(module: ModuleType) -> None:
    def set_poison(original: Call) -> Call:
        def call(self: Any, cause: str | None) -> Any:
            disarms = cause is None and _Me.committing
            if disarms:
                reach(_Me.name, "disarm")
            result = original(self, cause)
            if disarms:
                reach(_Me.name, "disarmed")
            return result

        return call

    _wrap(module.Worker, "set_poison", set_poison)


def _channel(module: ModuleType) -> None:
    """An agent's class is in its __main__, which no import hook sees; its line is opened just before it is made."""

    def enter(original: Call) -> Call:
        def call(self: Any) -> Any:
            agent = getattr(sys.modules["__main__"], "Agent", None)
            if agent is not None and not _Me.name:
                _agent(agent)
            return original(self)

        return call

    _wrap(module.Line, "__enter__", enter)


def _agent(agent: Any) -> None:
    def init(original: Call) -> Call:
        def call(self: Any, config: Any, *args: Any) -> None:
            _Me.name = f"agent-0-{config.index}"
            _register(_Me.name)
            original(self, config, *args)

        return call

    _wrap(agent, "__init__", init)
    _before(agent, "_prepare", _me, "prepare")
    _before(agent, "_open_ring", _me, "ring")
    _before(agent, "_take_plan", _me, "plan")
    _after(agent, "_send", _me, "sent")


def _ipc(module: ModuleType) -> None:
    _wrap(module.IpcRingWriter, "fill", _counted)


def _reference_server(module: ModuleType) -> None:
    for method, point in (("pause", "pause"), ("flush_cache", "flush"), ("resume", "resume")):
        _wrap(module.Server, method, functools.partial(_handler, point=point))
    _wrap(module.Server, "attach", _attach_handler)


def _handler(original: Call, *, point: str) -> Call:
    async def call(self: Any, http: Any) -> Any:
        reach(_server(), point)
        return await original(self, http)

    return call


def _attach_handler(original: Call) -> Call:
    async def call(self: Any, http: Any) -> Any:
        reach(_server(), "attach")
        answer = asyncio.ensure_future(original(self, http))
        order = CONTROL / f"fail-{_server()}"
        while not (await asyncio.wait([answer], timeout=0.02))[0]:
            if order.exists():
                order.unlink()
                answer.add_done_callback(lambda done: done.exception())  # nobody asks it any more
                note("attach failed")
                raise InjectedError("injected by the fault matrix")
        return answer.result()

    return call


_POINTS: dict[str, Callable[[ModuleType], None]] = {
    "ckpt_core.session": _session,
    "ckpt_core.fleet": _fleet,
    "ckpt_core.worker": _worker,
    "ckpt_core.apply": _apply,
    "ckpt_core.channel": _channel,
    "ckpt_core.transport.ipc": _ipc,
    "ckpt_conformance.reference.model": _model,
    "ckpt_conformance.reference.worker": _reference_worker,
    "ckpt_conformance.reference.server": _reference_server,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps methods of a module right after its code ran."""

    def __init__(self) -> None:
        self._left = dict(_POINTS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self._left.pop(fullname, None)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """From now on modules get their points as they are imported."""
    sys.meta_path.insert(0, _Finder())
