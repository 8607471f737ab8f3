"""Plays the relays of an update on the networks of its hosts: buckets as fluids that share what a NIC carries.

`simulate` serves the lanes of thousands of hosts in a fixed order, one bucket at a time. Agents do better: each of their
connections goes on as soon as its next bucket is there, and all that are busy share a NIC. Here that is played, for clusters
where there are not too many connections: rates are max-min fair (Bertsekas, Gallager 1987, "Data Networks", 6.5.2), which
long TCP flows come near to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckpt_core.cost import LaneSpeeds, Prediction, predict
from ckpt_core.fleet_plan import FleetPlan
from ckpt_core.limits import Limits
from ckpt_core.relay import FROM_POOL, Departure, Relay
from ckpt_core.relaying import slot_count

_GB = 1e9
_MOST_DEPARTURES = 20_000
_HANDOVER_S = 500e-6  # until an agent that waits sees that a bucket is there
_LEFT_BYTES = 0.5


def predict_fleet(plan: FleetPlan, limits: Limits | LaneSpeeds | None = None) -> Prediction:
    """Time of an update over several hosts, first byte to last: of the network, or of the slowest host where that takes longer."""
    assert plan.routed is not None, "a plan of one host has no network"
    known = predict(plan.routed, limits)
    relays = [relay for host in plan.relays for relay in host]
    if sum(len(relay.departures) for relay in relays) > _MOST_DEPARTURES:
        return known
    seconds = play(plan)
    inside = [predict(host, limits) for host in plan.plans if host.steps and host.receivers]
    slowest = max(inside, key=lambda found: found.seconds, default=known)
    if slowest.seconds > seconds:
        return slowest
    return Prediction(
        seconds=seconds, lower_bound_s=known.lower_bound_s, bottleneck=known.bottleneck, busy_s=known.busy_s
    )


def play(plan: FleetPlan) -> float:
    """Seconds until the last bucket has come in."""
    assert plan.routed is not None, "a plan of one host has no network"
    rates = (plan.routed.topology.nic_gb_s * plan.routed.topology.nics * _GB).tolist()
    agents = [_Agent.of(host, agent, plan) for host, its in enumerate(plan.relays) for agent in range(len(its))]
    flows = [
        _Flow(sender=agent, receiver=agents[peer], outlet=outlet)
        for agent in agents
        for outlet, peer in enumerate(agent.relay.outlets)
    ]
    inlet_of = {(flow.sender.number, flow.receiver.number): flow for flow in flows}
    for agent in agents:
        agent.inlets = [inlet_of[peer, agent.number] for peer in agent.relay.inlets]
        agent.grant()
    return _run(flows, rates)


@dataclass(slots=True, kw_only=True, eq=False)
class _Agent:
    """What one has, and has still to give slots to."""

    number: int
    host: int
    relay: Relay
    sizes: dict[int, int]
    uses: dict[int, int]
    free: int
    granted: int = 0
    inlets: list[_Flow] = field(default_factory=list)
    arrived_at: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, host: int, agent: int, plan: FleetPlan) -> _Agent:
        relay = plan.relays[host][agent]
        uses: dict[int, int] = {arrival.seq: 0 for arrival in relay.arrivals}
        for departure in relay.departures:
            if departure.seq != FROM_POOL:
                uses[departure.seq] += 1
        return cls(
            number=sum(len(its) for its in plan.relays[:host]) + agent,
            host=host,
            relay=relay,
            sizes={step.seq: step.bucket.size_bytes for step in plan.plans[host].steps if step.owner == agent},
            uses=uses,
            free=slot_count(relay),
        )

    def grant(self) -> None:
        """Slots in the order of arrivals."""
        while self.free and self.granted < len(self.relay.arrivals):
            arrival = self.relay.arrivals[self.granted]
            self.inlets[arrival.inlet].granted.append(arrival.seq)
            self.granted += 1
            self.free -= 1

    def use(self, seq: int) -> None:
        """Passed on once; or, where nobody is to get it next, in the ring."""
        self.uses[seq] -= 1
        if self.uses[seq] <= 0:
            self.free += 1
            self.grant()


@dataclass(slots=True, kw_only=True, eq=False)
class _Flow:
    """One connection: what is on it, and what is to come."""

    sender: _Agent
    receiver: _Agent
    outlet: int
    waiting: deque[Departure] = field(default_factory=deque)
    granted: deque[int] = field(default_factory=deque)
    left_bytes: float = 0.0
    rate: float = 0.0
    busy: bool = False

    def __post_init__(self) -> None:
        self.waiting.extend(item for item in self.sender.relay.departures if item.outlet == self.outlet)

    def ready_at(self) -> float | None:
        """When the next bucket can go; None where that is not known yet."""
        if self.busy or not self.waiting or not self.granted:
            return None
        item = self.waiting[0]
        return 0.0 if item.seq == FROM_POOL else self.sender.arrived_at.get(item.seq)

    def start(self) -> None:
        """Put it on the way."""
        self.busy, self.left_bytes = True, float(self.receiver.sizes[self.granted[0]])

    def finish(self, now: float) -> None:
        """It is there."""
        self.busy, self.rate = False, 0.0
        item, seq = self.waiting.popleft(), self.granted.popleft()
        self.receiver.arrived_at[seq] = now + _HANDOVER_S
        if not self.receiver.uses[seq]:
            self.receiver.use(seq)
        if item.seq != FROM_POOL:
            self.sender.use(item.seq)


def _run(flows: Sequence[_Flow], rates: Sequence[float]) -> float:
    now = last = 0.0
    while True:
        later: list[float] = []
        for flow in flows:
            ready = flow.ready_at()
            if ready is not None and ready <= now:
                flow.start()
            elif ready is not None:
                later.append(ready)
        busy = [flow for flow in flows if flow.busy]
        if not busy and not later:
            return last
        _share(busy, rates)
        step = min([flow.left_bytes / flow.rate for flow in busy] + [ready - now for ready in later])
        now += step
        for flow in busy:
            flow.left_bytes -= flow.rate * step
            if flow.left_bytes <= _LEFT_BYTES:
                flow.finish(now)
                last = now


def _share(busy: Sequence[_Flow], rates: Sequence[float]) -> None:
    """Max-min fair rates: the scarcest NIC is shared evenly, then the next with what is left."""
    open_flows = dict.fromkeys(busy)  # in their order: the same rates each time
    left = {(host, way): rate for host, rate in enumerate(rates) for way in (0, 1)}
    while open_flows:
        users: dict[tuple[int, int], list[_Flow]] = {}
        for flow in open_flows:
            users.setdefault((flow.sender.host, 0), []).append(flow)
            users.setdefault((flow.receiver.host, 1), []).append(flow)
        scarcest = min(users, key=lambda nic: left[nic] / len(users[nic]))
        each = left[scarcest] / len(users[scarcest])
        for flow in users[scarcest]:
            flow.rate = each
            del open_flows[flow]
            left[flow.sender.host, 0] -= each
            left[flow.receiver.host, 1] -= each
