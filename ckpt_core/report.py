"""Parts of an update's report, out of what its peers said."""

from __future__ import annotations

import msgspec

from ckpt_core import process, wire
from ckpt_core.endpoint import Endpoint
from ckpt_core.metrics import RankReport, Stopwatch
from ckpt_core.trace import Lane, Track, TrackKind


def rank_report(
    hello: wire.RankHello, verified: wire.Verified, endpoint: Endpoint, *, version: str, digest: str
) -> RankReport:
    """What one rank holds and did."""
    return RankReport(
        endpoint=endpoint.url,
        engine=endpoint.engine,
        rank=hello.rank.rank,
        device=hello.rank.device_uuid,
        version=version,
        digest=digest,
        fingerprint=verified.fingerprint,
        stats=msgspec.structs.replace(verified.stats, tracks=()),
    )


def controller_tracks(watch: Stopwatch) -> tuple[Track, ...]:
    """The stages of the update, as the controller's own track."""
    here = process.current()
    return (
        Track(
            name="controller",
            kind=TrackKind.CONTROLLER,
            lane=Lane.HOST,
            pid=here.pid,
            boot_id=here.boot_id,
            spans=tuple(watch.spans),
        ),
    )
