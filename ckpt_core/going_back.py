"""After an update that left weights mixed: back to what engines ran before, by an update to that version, where it is warm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from ckpt_core.errors import CkptError, EngineError, Outcome, UpdateAborted
from ckpt_core.expected import Expected
from ckpt_core.fleet import Fleet, Member
from ckpt_core.history import History
from ckpt_core.outcomes import SAYS, worst
from ckpt_core.store_records import EngineRecord

_log = logging.getLogger(__name__)
Replay = Callable[[Fleet, str, Expected], None]  # engines, the version's label, and what they must come to


def go_back(
    aborted: UpdateAborted, fleet: Fleet, ran: Mapping[str, EngineRecord], history: History, replay: Replay
) -> UpdateAborted:
    """What the failed update comes to. Engines that are gone, or of which nobody knows what they ran, stay as they are.

    Args:
        ran: by URL: what engines ran before.
        replay: moves some of them to a version; raises where that fails, too.
    """
    by_endpoint, causes = dict(aborted.by_endpoint), list(aborted.causes)
    for group in _groups(aborted, fleet, ran):
        record = ran[group[0].endpoint.url]
        try:
            if history.warm(record.digest) is None:
                raise CkptError(f"version {record.version or record.digest} is not warm any more; update again")
            fingerprints = {member.endpoint.url: ran[member.endpoint.url].fingerprints for member in group}
            replay(Fleet(members=group), record.version, Expected(digest=record.digest, fingerprints=fingerprints))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 told among the causes
            _log.warning("going back to %s failed: %s", record.version or record.digest, error)
            causes.append(error)
            by_endpoint |= dict.fromkeys((member.endpoint.url for member in group), Outcome.POISONED)
        else:
            for member in group:
                if member.serves():
                    by_endpoint[member.endpoint.url] = Outcome.RESTORED
                    continue
                by_endpoint[member.endpoint.url] = Outcome.POISONED  # for whoever routes: it serves nobody
                causes.append(EngineError(f"{member.endpoint} has its old weights again, and could not be resumed"))
    outcome = worst(by_endpoint.values())
    before, _, cause = str(aborted).partition(" Cause: ")
    text = f"{before.partition(': ')[0]}: {SAYS[outcome]} Cause: {cause}"
    return UpdateAborted(text, outcome=outcome, by_endpoint=by_endpoint, causes=causes)


def _groups(aborted: UpdateAborted, fleet: Fleet, ran: Mapping[str, EngineRecord]) -> list[Sequence[Member]]:
    """Engines that live and need it, by what they ran. One that committed goes back, too: all or nothing."""
    groups: dict[str, list[Member]] = {}
    for member in fleet.members:
        url = member.endpoint.url
        needs = aborted.by_endpoint.get(url) in (Outcome.POISONED, Outcome.COMMITTED)
        if needs and url in ran and _answers(member):
            groups.setdefault(ran[url].digest, []).append(member)
    return list(groups.values())


def _answers(member: Member) -> bool:
    try:
        member.check()
    except CkptError as error:
        _log.warning("not gone back: %s", error)
        return False
    return True
