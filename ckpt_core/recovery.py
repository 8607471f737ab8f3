"""Updates whose controller died: finished where every rank had verified, else undone; all engines of an update together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ckpt_core.errors import CkptError, Outcome
from ckpt_core.expected import Expected
from ckpt_core.fleet import Fleet, Member
from ckpt_core.going_back import Replay
from ckpt_core.history import History
from ckpt_core.outcomes import worst
from ckpt_core.states import SessionState
from ckpt_core.store_records import UpdateRecord

_log = logging.getLogger(__name__)


def recover(fleet: Fleet, history: History, replay: Replay) -> dict[str, Outcome]:
    """Of all engines of a fleet, checked and locked: what became of each that was left behind."""
    members = {member.endpoint.url: member for member in fleet.members}
    found: dict[str, Outcome] = {}
    for update in history.left_behind():
        if all(endpoint.url in members for endpoint in update.endpoints):
            outcomes = _recover_one(update, members, history, replay)
            history.aborted(update.update_id, outcomes)
            found |= outcomes
    if found:
        _log.info("recovered: %s", worst(found.values()).value)
    return found


def _recover_one(
    update: UpdateRecord, members: Mapping[str, Member], history: History, replay: Replay
) -> dict[str, Outcome]:
    """Engines that were restarted since have what they started with; of the others all are moved, or those that are mixed."""
    outcomes = {endpoint.url: Outcome.CLEAN for endpoint in update.endpoints}
    old = {endpoint.url: endpoint.old_digest for endpoint in update.endpoints}
    same = [
        members[endpoint.url]
        for endpoint in update.endpoints
        if not endpoint.instance_id or endpoint.instance_id == members[endpoint.url].instance_id
    ]
    if update.state == SessionState.VERIFYING.value:
        if _moved(same, update.new_digest, update, history, replay):
            return outcomes | _serving(same, Outcome.COMMITTED)
    else:
        mixed = [member for member in same if member.was_poisoned]
        for member in same:
            if member not in mixed:
                member.plugin.hook.ckpt_resume(endpoint=member.endpoint, version=None)
        same = mixed
    for digest in sorted({old[member.endpoint.url] for member in same}):
        group = [member for member in same if old[member.endpoint.url] == digest]
        moved = _moved(group, digest, update, history, replay)
        outcomes |= _serving(group, Outcome.RESTORED) if moved else dict.fromkeys(map(_url, group), Outcome.POISONED)
    return outcomes


def _serving(members: Sequence[Member], outcome: Outcome) -> dict[str, Outcome]:
    """Of engines that hold one version: those that could not be resumed serve nobody."""
    return {_url(member): outcome if member.serves() else Outcome.POISONED for member in members}


def _url(member: Member) -> str:
    return member.endpoint.url


def _moved(members: Sequence[Member], digest: str, update: UpdateRecord, history: History, replay: Replay) -> bool:
    """Whether all of them could be brought to a version; else none of them serves."""
    version = history.warm(digest) if digest else None
    if version is None or not members:
        return False
    prints = {}
    for member in members:
        before = history.ran(member.endpoint.url, member.instance_id)
        if before is not None and before.digest == digest:
            prints[member.endpoint.url] = before.fingerprints
    label = version.label or update.version
    try:
        for member in members:
            member.check()  # what an attempt before left
            # the dead controller paused it, so this one resumes it
            member.paused_here = True
        replay(Fleet(members=members), label, Expected(digest=digest, fingerprints=prints))
    except CkptError as error:
        _log.warning("engines could not be brought to %s: %s", label or digest, error)
        return False
    return True
