"""What ranks and agents tell of their part in an update."""

from __future__ import annotations

import msgspec

from ckpt_core.trace import Track


class RankStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank did in an update. Seconds of wall time, bytes as they lie in the checkpoint.

    Attributes:
        digested_bytes: compared, as they arrived, with what the agents read; live_bytes: compared where they lie now.
        replayed_bytes: read by recorded copies, without the engine's loader; of `received_bytes`, which counts whole pieces.
        recorded_share: of the bytes that the engine's loader takes: those that recorded copies could.
        learned: its next layout will be another: this update proved what recorded copies can do.
    """

    received_bytes: int
    wait_s: float
    load_s: float
    digest_s: float
    begin_s: float
    finish_s: float
    fingerprint_s: float
    retained_bytes: int
    digested_bytes: int
    live_bytes: int = 0
    replayed_bytes: int = 0
    recorded_share: float = 0.0
    learned: bool = False
    ignored: tuple[str, ...] = ()
    tracks: tuple[Track, ...] = ()


class AgentStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent did in an update: bytes into its ring, and from and to other hosts."""

    sent_bytes: int
    copy_s: float
    wait_s: float
    total_s: float
    network_in_bytes: int = 0
    network_out_bytes: int = 0
    tracks: tuple[Track, ...] = ()
