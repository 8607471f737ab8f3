"""vLLM's session around a weight transfer, seen from the control side: four routes of which one does the work.

Opening and closing are bookkeeping in vLLM's workers. They are kept out of the time that clients notice: the session is opened
while vLLM's own /pause waits (20 ms at least), and closed while caches are flushed.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ckpt_core.errors import EngineError

if TYPE_CHECKING:
    from ckpt_core.contract import Rendezvous
    from ckpt_core.endpoint import Endpoint

_log = logging.getLogger(__name__)
_NOTE = "vllm native session"


@dataclass(slots=True, kw_only=True)
class _Session:
    opened: bool = False
    closing: Future[None] | None = None


def open_session(endpoint: Endpoint) -> None:
    """Once per transfer; a session that somebody else left open is forgotten by the first call."""
    session = _session(endpoint)
    _await_close(session)
    if not session.opened:
        endpoint.request("POST", "/init_weight_transfer_engine", json={"init_info": {}})
        endpoint.request("POST", "/start_weight_update")
        session.opened = True


def transfer(endpoint: Endpoint, rendezvous: Rendezvous) -> None:
    """The one call that does it all; blocks until the update is over."""
    open_session(endpoint)
    info = {"update_info": {"rendezvous": asdict(rendezvous)}}
    endpoint.request("POST", "/update_weights", json=info, timeout_s=rendezvous.lifetime_s)
    session = _session(endpoint)
    session.opened = False
    threads = ThreadPoolExecutor(1, thread_name_prefix="ckpt-vllm-finish")
    session.closing = threads.submit(_close, endpoint)
    threads.shutdown(wait=False)


def settle(endpoint: Endpoint) -> None:
    """Return once no session is open or being closed, so that others can open theirs. Raises nothing: the next one to open a
    session forgets one that could not be closed."""
    session = _session(endpoint)
    _await_close(session)
    if session.opened:
        session.opened = False
        _close(endpoint)


def _close(endpoint: Endpoint) -> None:
    try:
        endpoint.request("POST", "/finish_weight_update", json={})
    except EngineError as error:
        _log.warning("%s keeps its weight-update session open until the next update: %s", endpoint, error)


def _await_close(session: _Session) -> None:
    closing, session.closing = session.closing, None
    if closing is not None:
        closing.result()


def _session(endpoint: Endpoint) -> _Session:
    found = endpoint.notes.get(_NOTE)
    if not isinstance(found, _Session):
        found = endpoint.notes[_NOTE] = _Session()
    return found
