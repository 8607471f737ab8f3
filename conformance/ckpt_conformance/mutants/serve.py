"""`python -m ckpt_conformance.mutants.serve BUG PYTHON -m ckpt_conformance.reference ...`: the reference's server with one bug.

A prefix of the usual command, so that whoever starts servers need not know of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from unittest.mock import patch

from ckpt_conformance.reference.__main__ import main
from ckpt_conformance.reference.engine import Engine
from ckpt_conformance.reference.requests import Request
from ckpt_conformance.reference.scheduler import Scheduler
from ckpt_core.contract import PauseMode

_MODULE = ["-m", "ckpt_conformance.reference"]
_pause = Scheduler.pause


def prefix(bug: str) -> tuple[str, ...]:
    """What comes before the command of a server to give it that bug."""
    assert bug in BUGS, bug
    return sys.executable, "-m", "ckpt_conformance.mutants.serve", bug


def abort_freezes() -> None:
    """Pause mode abort puts requests back into the queue."""
    _take_for(PauseMode.ABORT, PauseMode.RETRACT)


def wait_freezes() -> None:
    """Pause mode wait does not wait."""
    _take_for(PauseMode.WAIT, PauseMode.RETRACT)


def keep_ends() -> None:
    """Pause mode keep ends requests."""
    _take_for(PauseMode.KEEP, PauseMode.ABORT)


def retract_keeps() -> None:
    """Requests that are retracted keep their keys and values."""

    def retract(scheduler: Scheduler) -> None:
        scheduler.waiting.extendleft(reversed(scheduler.running))
        scheduler.running.clear()

    patch.object(Scheduler, "_retract", retract).start()


def version_of_the_start() -> None:
    """Tokens name the version that the server was started with."""
    take = Scheduler.take
    patch.object(Scheduler, "take", lambda scheduler, token_ids, _version: take(scheduler, token_ids, "start")).start()


def version_of_the_first_token() -> None:
    """All tokens of an answer name the version of its first one."""
    take = Request.take

    def take_as_first(request: Request, token_id: int, version: str) -> None:
        take(request, token_id, request.versions[0] if request.versions else version)

    patch.object(Request, "take", take_as_first).start()


def flush_forgotten() -> None:
    """The route that flushes the cache does nothing."""
    patch.object(Engine, "_flush_cache", lambda _engine: None).start()


def _take_for(asked: PauseMode, done: PauseMode) -> None:
    def pause(scheduler: Scheduler, mode: PauseMode) -> None:
        _pause(scheduler, done if mode is asked else mode)

    patch.object(Scheduler, "pause", pause).start()


BUGS: Mapping[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (
        abort_freezes,
        wait_freezes,
        keep_ends,
        retract_keeps,
        version_of_the_start,
        version_of_the_first_token,
        flush_forgotten,
    )
}

if __name__ == "__main__":
    bug_name, _python, *command = sys.argv[1:]
    assert command[:2] == _MODULE, command
    BUGS[bug_name]()
    sys.exit(main(command[2:]))
