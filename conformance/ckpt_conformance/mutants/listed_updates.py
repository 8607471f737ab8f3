"""Mutants that only a real update shows, or that a session must not be taken in by."""

from __future__ import annotations

from ckpt_conformance.mutants import contents, sessions, workers
from ckpt_conformance.mutants.mutant import Mutant, ids

UPDATE_MUTANTS: tuple[Mutant, ...] = (
    Mutant(name="attaches_a_twin", worker_type=sessions.AttachesATwin, caught_by="core.update_end_to_end"),
    Mutant(name="version_not_told", worker_type=workers.VersionNotTold, caught_by="core.version_told"),
    Mutant(name="one_controller_only", worker_type=sessions.OneControllerOnly, caught_by="core.membership_change"),
    Mutant(name="own_patience", worker_type=sessions.OwnPatience, caught_by="core.controller_silent"),
    Mutant(name="watchdog", worker_type=sessions.Watchdog, caught_by="core.slow_rank"),
    Mutant(name="processed_twice", worker_type=sessions.NormsAreOffsets, caught_by="sharded.replay_is_a_load"),
    Mutant(
        name="swallowed_finish_error_in_a_session",
        worker_type=workers.SwallowedFinishError,
        caught_by="transactional.failed_update_is_silent",
        also=ids("finish_failure_surfaces"),
    ),
    Mutant(
        name="finished_is_committed", worker_type=sessions.FinishedIsCommitted, caught_by="transactional.all_or_none"
    ),
    Mutant(
        name="sticky_flag_in_a_session",
        worker_type=workers.StickyFlag,
        caught_by="transactional.undone_by_replay",
        also=ids(
            "transactional.update_after_abort", "transactional.snapshot_exact", "transactional.nothing_after_abort"
        ),
    ),
    Mutant(
        name="snapshot_in_part",
        worker_type=sessions.SnapshotInPart,
        caught_by="transactional.undone_by_snapshot",
        also=ids("transactional.snapshot_exact"),
    ),
    Mutant(
        name="version_cache_in_a_session",
        worker_type=contents.VersionCache,
        caught_by="transactional.rollback",
        also=ids("there_and_back"),
    ),
    Mutant(name="hang_on_peer_loss", worker_type=sessions.HangsOnPeerLoss, caught_by="transactional.peer_lost"),
)
