"""Parts of an update's report, out of what its peers said."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec

from ckpt_core import process, wire
from ckpt_core.agent_peers import AgentHost
from ckpt_core.boarding import Boarding
from ckpt_core.config import VerifyLevel
from ckpt_core.content import Content
from ckpt_core.endpoint import Endpoint
from ckpt_core.fleet import Fleet
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.metrics import HostReport, RankReport, Stopwatch
from ckpt_core.stats import RankStats
from ckpt_core.store_records import EngineRecord
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


def reached(level: VerifyLevel, ranks: Iterable[RankStats]) -> VerifyLevel:
    """The level that every byte of every rank reached."""
    if level is VerifyLevel.LIVE and any(stats.digested_bytes for stats in ranks):
        return VerifyLevel.ARRIVAL
    return level


def engine_records(
    fleet: Fleet,
    boarding: Boarding,
    verified: Mapping[bytes, wire.Verified | wire.Compared],
    *,
    content: Content,
    version: str,
    update_id: str,
) -> list[EngineRecord]:
    """What each engine runs, once it is committed."""
    instances = boarding.by_endpoint(lambda _peer, hello: hello.rank.instance_id)
    prints = boarding.by_endpoint(lambda peer, _hello: verified[peer].fingerprint)
    return [
        EngineRecord(
            url=member.endpoint.url,
            engine=member.endpoint.engine,
            instance_id=instances[member.endpoint.url][0],
            digest=content.digest,
            version=version,
            update_id=update_id,
            fingerprints=prints[member.endpoint.url],
            committed_at=time.time(),
        )
        for member in fleet.members
    ]


def host_reports(
    hosts: Sequence[AgentHost], plan: FleetPlan, sent: Mapping[bytes, wire.Sent]
) -> tuple[HostReport, ...]:
    """What went between hosts."""
    return tuple(
        HostReport(
            name=host.name,
            lacked_bytes=lacked,
            network_in_bytes=sum(sent[peer].stats.network_in_bytes for peer in host.peers),
            network_out_bytes=sum(sent[peer].stats.network_out_bytes for peer in host.peers),
        )
        for host, lacked in zip(hosts, plan.lacked_bytes, strict=False)  # none of a plan of one host
    )


def tracks_of(watch: Stopwatch, sent: Iterable[wire.Sent], verified: Mapping[str, wire.Verified]) -> tuple[Track, ...]:
    """The controller's own track, those of agents, and those of ranks by their names."""
    agents = [track for answer in sent for track in answer.stats.tracks]
    ranks = [replace(track, name=name) for name, answer in verified.items() for track in answer.stats.tracks]
    return (*_controller_tracks(watch), *agents, *ranks)


def _controller_tracks(watch: Stopwatch) -> tuple[Track, ...]:
    """The stages of the update."""
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
