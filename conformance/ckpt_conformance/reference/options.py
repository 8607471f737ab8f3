"""How ranks are started: read by the server, which imports no torch, and by the rank processes."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

ENGINE_NAME = "reference"
TAGS = ("weights", "kv_cache")
DEFAULT_PLUGIN = "ckpt_conformance.reference.plugin"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a rank is started.

    Attributes:
        load_format: "auto" reads the checkpoint, "dummy" makes random weights from the seed.
        quantise: keep linears as int8.
        dtype: of weights and activations; "auto" takes the checkpoint's.
        device: as torch names it.
        wait_for_weights: produce no token before the first committed update.
        prefix_blocks: bound of the prefix cache.
    """

    load_format: str = "auto"
    quantise: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    wait_for_weights: bool = False
    prefix_blocks: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPoolOptions:
    """How rank processes are started.

    Attributes:
        plugin: module with the hooks that attach calls in the ranks.
        threads: torch threads of a rank.
        start_timeout_s: until every rank has loaded its weights.
        step_timeout_s: deadline of any command but attach, and of a collective.
        attach_timeout_s: deadline of attach; the ranks have shorter ones of their own inside.
        nodes: hosts that the ranks are on, evenly.
        node_address, node_port: where the other hosts' nodes connect to.
    """

    model_dir: str
    tp_size: int
    instance_id: str
    worker: WorkerOptions
    plugin: str = DEFAULT_PLUGIN
    threads: int = 1
    start_timeout_s: float = 300.0
    step_timeout_s: float = 120.0
    attach_timeout_s: float = 3600.0
    nodes: int = 1
    node_address: str = "127.0.0.1"
    node_port: int = 0

    @property
    def local_ranks(self) -> int:
        """Ranks on each host; the first are the server's own."""
        return self.tp_size // self.nodes


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank process is started with; travels as JSON on its command line.

    Attributes:
        pipe_fd: inherited socket to the server.
        store_fd: inherited listening socket of the ranks' rendezvous, for rank 0; else -1.
        exchange_fd: inherited shared memory of the ranks' small collectives; -1 with a single rank, or several hosts.
        store_host, store_port: where it listens; port 0 with a single rank.
    """

    pool: RankPoolOptions
    rank: int
    pipe_fd: int
    store_fd: int
    exchange_fd: int
    store_host: str
    store_port: int
    parent_pid: int
