"""checkpoint-engine's schedule, played with lane speeds, against the times that its README publishes.

The schedule, read from its source (checkpoint_engine/ps.py, `_update_per_bucket`, and worker.py): each rank holds an even share.
In rounds, every rank copies its next bucket to its GPU and synchronises; then bucket after bucket is copied within its owner's
GPU, broadcast to all GPUs, and, when the engine is done with the bucket before it, agreed upon with an all-reduce and handed to
the engine, which loads it tensor by tensor while the next one is broadcast. With P2P the copies to the GPU are RDMA reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Of all machines alike. GB/s are 1e9 bytes a second.

    Attributes:
        h2d_gb_s: into each GPU, all at once (two H200s, PCIe 5 x16: 55).
        d2d_gb_s: within a GPU.
        nvlink_gb_s: broadcast in one host; by GPU: NVLink of H800 is 200 GB/s each way, that of H20 and H200 450, of which NCCL's
            broadcast reached 370 (82 %) on two H200s.
        nic_gb_s: of one GPU's NIC, not published; 200 Gbit/s assumed.
        load_gb_s: an engine rank copies out of a bucket.
        tensor_s: an engine rank spends on a tensor beside its bytes.
        bucket_s: all-reduce, synchronise, request and reply.
        setup_s: process group and its first collective, before and after (0.16 s and 0.85 s on two H200s).
    """

    h2d_gb_s: float = 55.0
    d2d_gb_s: float = 1500.0
    nvlink_h800_gb_s: float = 164.0
    nvlink_h20_gb_s: float = 370.0
    nic_gb_s: float = 25.0
    load_gb_s: float = 1500.0
    tensor_s: float = 128e-6
    bucket_s: float = 2e-3
    setup_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the README's table: seconds, and the bucket size beside them in GiB."""

    model: str
    gpus: int
    device: str
    tensor_ranks: int
    broadcast_s: float
    broadcast_gib: float
    p2p_s: float
    p2p_gib: float


def _row(model: str, gpus: str, broadcast: tuple[float, float], p2p: tuple[float, float]) -> Row:
    number, _, device = gpus.partition("x")
    return Row(
        model=model,
        gpus=int(number),
        device=device,
        tensor_ranks=min(int(number), 16),
        broadcast_s=broadcast[0],
        broadcast_gib=broadcast[1],
        p2p_s=p2p[0],
        p2p_gib=p2p[1],
    )


PUBLISHED = (
    _row("glm-4.5-air", "8xH800", (3.47, 3.02), (4.12, 3.02)),
    _row("qwen3-235b-a22b", "8xH800", (6.22, 2.67), (7.10, 2.68)),
    _row("deepseek-v3.1", "16xH20", (10.19, 5.39), (11.80, 5.41)),
    _row("kimi-k2", "16xH20", (14.36, 5.89), (17.49, 5.91)),
    _row("deepseek-v3.1", "256xH20", (11.33, 8.0), (11.81, 8.0)),
    _row("kimi-k2", "256xH20", (16.04, 8.0), (16.75, 8.0)),
)


def play(row: Row, size_bytes: int, tensors: int, speeds: Speeds, *, p2p: bool) -> float:
    """Seconds of one update."""
    ranks = row.tensor_ranks if p2p else row.gpus
    most = (row.p2p_gib if p2p else row.broadcast_gib) * GIB
    share = size_bytes / ranks
    rounds = max(1, -(-int(share) // int(most)))
    bucket, of_bucket = share / rounds, tensors / ranks / rounds
    wire = speeds.nvlink_h800_gb_s if row.device == "H800" else speeds.nvlink_h20_gb_s
    if ranks > 8:
        wire = min(wire, 8 * speeds.nic_gb_s)
    fill = speeds.nic_gb_s if p2p else speeds.h2d_gb_s
    now, loaded = speeds.setup_s, 0.0
    for _ in range(rounds):
        now += bucket / fill / 1e9
        for _ in range(ranks):
            now += bucket / speeds.d2d_gb_s / 1e9 + bucket / wire / 1e9
            now = max(now, loaded) + speeds.bucket_s
            loaded = now + of_bucket * speeds.tensor_s + bucket / speeds.load_gb_s / 1e9
    return max(now, loaded)


def fitted(sizes: dict[str, tuple[int, int]], speeds: Speeds) -> Speeds:
    """The two numbers that are not lane speeds, chosen once for all rows: time a tensor, and time to set up."""
    best, least = speeds, float("inf")
    for micros in range(60, 141, 4):
        for tenths in range(5, 26, 2):
            tried = replace(speeds, tensor_s=micros * 1e-6, setup_s=tenths / 10)
            wrong = sum(
                (play(row, *sizes[row.model], tried, p2p=False) / row.broadcast_s - 1) ** 2
                + (play(row, *sizes[row.model], tried, p2p=True) / row.p2p_s - 1) ** 2
                for row in PUBLISHED
            )
            if wrong < least:
                best, least = tried, wrong
    return best
