"""Which agent sends which bucket."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(sizes_bytes: Sequence[int], agents: int) -> tuple[int, ...]:
    """Deal buckets to agents so that bytes are even, at the end and at every point before it.

    Greedy, in sequence: each bucket goes to the agent with the fewest bytes so far, the lowest of equals
    (list scheduling, Graham 1966). The loads of any two agents never differ by more than the largest bucket
    so far, so that ranks which consume in sequence keep all agents busy.
    """
    assert agents > 0, agents
    loads = [(0, agent) for agent in range(agents)]
    owners = []
    for size_bytes in sizes_bytes:
        load, agent = loads[0]
        heapq.heapreplace(loads, (load + size_bytes, agent))
        owners.append(agent)
    return tuple(owners)
