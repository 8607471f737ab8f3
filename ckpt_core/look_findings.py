"""What ranks said in a look, engine by engine; and whether it proves that an engine runs a version."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from ckpt_core import wire
from ckpt_core.errors import VerificationError
from ckpt_core.fleet import Fleet, Member
from ckpt_core.inspection import Inspection
from ckpt_core.look_report import EngineLook

_log = logging.getLogger(__name__)
_NAMES_TOLD = 16


def engine_looks(
    fleet: Fleet, inspection: Inspection, version: str, digest: str, recorded: Mapping[str, tuple[str, ...]]
) -> dict[str, EngineLook]:
    """What a look found, by URL.

    Args:
        recorded: fingerprints to compare with, by URL.
    """
    found = {}
    for index, member in enumerate(fleet.members):
        peers = [peer for peer, hello in inspection.boarding.hellos.items() if hello.endpoint_index == index]
        held, compared = [inspection.held[peer] for peer in peers], [inspection.compared[peer] for peer in peers]
        before = recorded.get(member.endpoint.url, ())
        found[member.endpoint.url] = _engine_look(member, version, digest, held, compared, before)
    return found


def _engine_look(  # noqa: PLR0917 (all of it makes one engine's part)
    member: Member,
    version: str,
    digest: str,
    held: Sequence[wire.HeldSlices],
    compared: Sequence[wire.Compared],
    before: tuple[str, ...],
) -> EngineLook:
    differing = _each_once(answer.differing for answer in compared)
    unchecked = _each_once(answer.unchecked for answer in held)
    prints = tuple(answer.fingerprint for answer in compared)
    return EngineLook(
        endpoint=member.endpoint.url,
        engine=member.endpoint.engine,
        version=version,
        digest=digest,
        equal_bytes=sum(answer.equal_bytes for answer in compared),
        differing_bytes=sum(answer.differing_bytes for answer in compared),
        unchecked_bytes=sum(answer.unchecked_bytes for answer in held),
        differing=differing[:_NAMES_TOLD],
        differing_count=max([len(differing), *(answer.differing_count for answer in compared)]),
        unchecked=unchecked[:_NAMES_TOLD],
        unchecked_count=len(unchecked),
        fingerprints=prints,
        as_committed=before == prints if any(before) and any(prints) else None,
        notes=_each_once([answer.why] for answer in held if answer.why),
    )


def _each_once(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))


def check_equal(engine: EngineLook) -> None:
    """Raise VerificationError where an engine does not run what is to be adopted, or nobody can tell."""
    where, what = f"{engine.engine} at {engine.endpoint}", engine.version
    if engine.differing_count:
        names = ", ".join(f"{name!r:.200}" for name in engine.differing[:4])
        raise VerificationError(
            f"{where}: expected version {what}, got other bytes in {engine.differing_count} tensors ({names}), "
            f"{engine.differing_bytes} bytes; adopt the checkpoint that it runs, or update it"
        )
    if engine.as_committed is False:
        raise VerificationError(
            f"{where}: expected the live weights that were committed as version {what}, got other fingerprints; update it"
        )
    if not engine.equal_bytes:
        raise VerificationError(
            f"{where}: nothing of version {what} could be compared ({'; '.join(engine.notes)}); update it to that version once"
        )
    if engine.unchecked_bytes:
        _log.warning(
            "%s: %.1f %% of the bytes of version %s could not be compared (%d tensors, e.g. %s); fingerprints prove that an "
            "undo comes out as it is now",
            where,
            100 * (1 - engine.checked_share),
            what,
            engine.unchecked_count,
            ", ".join(engine.unchecked[:2]),
        )
