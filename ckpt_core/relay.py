"""What agents of several hosts pass on to each other: which buckets come in from whom, and which go out to whom.

Beside the plan of its own host, an agent gets its relay: the buckets of its ring that come from another host's agent, and all
that it sends to agents of other hosts, from its pool or as it came in.
"""

from __future__ import annotations

import msgspec

from ckpt_core.bucket import Bucket

FROM_POOL = 0


class Arrival(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A bucket that comes in.

    Attributes:
        seq: its number in this agent's ring.
        inlet: which of `Relay.inlets` it comes from.
    """

    seq: int
    inlet: int


class Departure(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A bucket that goes out.

    Attributes:
        outlet: which of `Relay.outlets` it goes to.
        to_seq: its number in the ring of that agent.
        seq: of the arrival that is passed on, or FROM_POOL.
        bucket: what is sent from the pool; None for what came in.
    """

    outlet: int
    to_seq: int
    seq: int = FROM_POOL
    bucket: Bucket | None = None


class Relay(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's part beside its own host's plan.

    Attributes:
        inlets: agents (numbers in the whole group) that send to this one.
        outlets: agents that this one sends to.
        arrivals: in order of seq.
        departures: in the order of each outlet.
        slots: buckets that must find room here between coming in and going on: with fewer, hosts could wait for each other.
    """

    inlets: tuple[int, ...] = ()
    outlets: tuple[int, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    departures: tuple[Departure, ...] = ()
    slots: int = 0
