"""What an update writes down on its way, so that it can be finished or undone by whoever comes later."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_core.fleet import Fleet, Member
from ckpt_core.history import History
from ckpt_core.session import Session
from ckpt_core.states import SessionState
from ckpt_core.store_records import EngineRecord, UpdateEndpoint


def note(session: Session, fleet: Fleet, history: History, ran: Mapping[str, EngineRecord | None]) -> None:
    """Before engines are paused, and when all ranks have verified: from then on the update is to be finished.

    Args:
        ran: by URL: what engines run until then, where that is known.

    Raises:
        ConfigError: the version's label is bound to another one.
    """
    if session.state is SessionState.PLANNED:
        endpoints = [_endpoint(member, ran[member.endpoint.url]) for member in fleet.members]
        history.begin(session.update_id, endpoints, session.content, session.version)
    elif session.state is SessionState.VERIFYING:
        history.store.move_update(session.update_id, session.state.value)


def _endpoint(member: Member, ran: EngineRecord | None) -> UpdateEndpoint:
    return UpdateEndpoint(
        url=member.endpoint.url,
        engine=member.endpoint.engine,
        instance_id=member.instance_id,
        old_digest=ran.digest if ran else "",
    )
