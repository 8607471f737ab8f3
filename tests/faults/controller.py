"""Controllers that may be killed or stopped: a process that imported everything forks one for each job.

A job is a line of JSON on standard input. How the update ended goes to the job's report file; what the controller's own
exit status was, to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import ckpt_core.agent_process
import ckpt_core.session
from ckpt_core import Target, UpdateAborted, UpdateConfig, Updater
from ckpt_core.endpoint import EndpointOptions


def update(job: dict[str, Any]) -> None:
    """Carry a job out, and say how."""
    options = EndpointOptions(timeout_s=job["http_timeout_s"], pause_timeout_s=job["http_timeout_s"])
    targets = [Target(engine="reference", url=url) for url in job["urls"]]
    with Updater(targets, config=UpdateConfig(**job["config"]), endpoint_options=options) as updater:
        try:
            report = updater.update(job["checkpoint"], version=job["version"])
            _say(job, outcome=report.outcome.name, error="", by_endpoint={})
        except UpdateAborted as aborted:
            by_endpoint = {url: outcome.name for url, outcome in aborted.by_endpoint.items()}
            _say(job, outcome=aborted.outcome.name, error=_chain(aborted), by_endpoint=by_endpoint)
        except BaseException as error:  # noqa: BLE001 (told, too)
            _say(job, outcome="", error=_chain(error), by_endpoint={})


def _say(job: dict[str, Any], **facts: object) -> None:
    draft = Path(job["report"] + ".draft")
    draft.write_text(json.dumps(facts))
    draft.rename(job["report"])


def _chain(error: BaseException) -> str:
    causes = getattr(error, "causes", ())
    return "; ".join(f"{type(one).__name__}: {one}" for one in (error, *causes))


def _controller(line: str) -> None:
    """In the forked process; never returns."""
    status = 1
    try:
        job = json.loads(line)
        # a stopped rank or agent is waited for: longer in production than a matrix of hundreds of cases has time for
        for module, name in ((ckpt_core.session, "_UNDO_TIMEOUT_S"), (ckpt_core.agent_process, "_STOP_TIMEOUT_S")):
            assert hasattr(module, name)
            setattr(module, name, job["patience_s"])
        update(job)
        status = 0
    except BaseException:  # noqa: BLE001 (an interrupt of what comes after the update, too)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """One job at a time, until standard input ends."""
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _controller(line)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
