"""How far a suite goes, where a check runs, and which kinds of models it asks the harness for."""

from __future__ import annotations

from enum import Enum, IntEnum


class Level(IntEnum):
    """Levels of conformance; each includes those below it.

    CORE: the contract of the hooks. VERIFIED: digests and fingerprints. TRANSACTIONAL: old or new over a fleet, rollback.
    SHARDED: recorded layouts, slices, several hosts.
    """

    CORE = 1
    VERIFIED = 2
    TRANSACTIONAL = 3
    SHARDED = 4


class Tier(Enum):
    """What a check needs to run.

    STATIC: only the plugin. WORKER: a worker in this process, whose hooks are called directly. GROUP: real updates, with
    agents, into workers in this process. SERVER: real updates into a server with several ranks.
    """

    STATIC = "static"
    WORKER = "worker"
    GROUP = "group"
    SERVER = "server"


class ModelKind(Enum):
    """A property of a tiny model that some checks are about. Every harness has PLAIN; the others as far as its engine goes.

    ODD_SIZES: sizes that are no multiples of anything. SCALARS: a tensor without dimensions, and one without elements.
    DRAFT: a draft model beside it, in the same checkpoint.
    SHARDED: the worker is one rank of several and holds slices, but not the first ones.
    """

    PLAIN = "plain"
    TIED = "tied"
    EXPERTS = "experts"
    QUANTISED = "quantised"
    ODD_SIZES = "odd_sizes"
    SCALARS = "scalars"
    DRAFT = "draft"
    SHARDED = "sharded"
