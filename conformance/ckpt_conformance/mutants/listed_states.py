"""Mutants that do what they should refuse, or say what is not so."""

from __future__ import annotations

from ckpt_conformance.mutants import states, workers
from ckpt_conformance.mutants.mutant import Mutant, ids
from ckpt_core.contract import PauseMode

STATE_MUTANTS: tuple[Mutant, ...] = (
    Mutant(name="double_begin", worker_type=workers.DoubleBegin, caught_by="core.begin_refused_while_updating"),
    Mutant(name="eager_begin", worker_type=states.EagerBegin, caught_by="core.begin_refused_while_serving"),
    Mutant(name="sleepy_begin", worker_type=workers.SleepyBegin, caught_by="core.begin_refused_while_asleep"),
    Mutant(name="late_load", worker_type=states.LateLoad, caught_by="core.load_refused_outside_update"),
    Mutant(name="finishes_twice", worker_type=states.FinishesTwice, caught_by="core.finish_refused_outside_update"),
    Mutant(name="background_thread", worker_type=states.BackgroundThread, caught_by="core.no_hidden_threads"),
    Mutant(name="barrier", worker_type=states.Barrier, caught_by="core.no_hidden_collectives"),
    Mutant(name="swallowed_load_error", worker_type=workers.SwallowedLoadError, caught_by="core.load_failure_surfaces"),
    Mutant(
        name="swallowed_finish_error",
        worker_type=workers.SwallowedFinishError,
        caught_by="core.finish_failure_surfaces",
    ),
    Mutant(name="unparked", worker_type=states.Unparked, caught_by="transactional.abort_before_load"),
    Mutant(name="lying_abort", worker_type=workers.LyingAbort, caught_by="transactional.abort_honest"),
    Mutant(name="half_honest_abort", worker_type=states.HalfHonestAbort, caught_by="transactional.abort_honest"),
    Mutant(name="forgetful_abort", worker_type=states.ForgetfulAbort, caught_by="transactional.abort_twice"),
    Mutant(name="late_buckets", worker_type=states.LateBuckets, caught_by="transactional.nothing_after_abort"),
    Mutant(
        name="sticky_flag",
        worker_type=workers.StickyFlag,
        caught_by="transactional.update_after_abort",
        also=ids("transactional.snapshot_exact", "transactional.nothing_after_abort"),
    ),
    Mutant(
        name="poison_ignored",
        worker_type=workers.PoisonIgnored,
        caught_by="transactional.poison_guard",
        also=ids("transactional.poison_outlives_update"),
    ),
    Mutant(
        name="poison_cleared_by_finish",
        worker_type=workers.PoisonClearedByFinish,
        caught_by="transactional.poison_outlives_update",
    ),
    Mutant(
        name="version_before_commit", worker_type=states.VersionAtFinish, caught_by="transactional.version_at_commit"
    ),
    Mutant(name="wait_forgotten", worker_type=workers.WaitForgotten, caught_by="core.initial_weights"),
    Mutant(
        name="wakes_to_serve",
        worker_type=states.WakesToServe,
        caught_by="core.sleep_and_wake",
    ),
    Mutant(name="deaf_to_abort", worker_type=states.deaf_to(PauseMode.ABORT), caught_by="core.pause_abort"),
    Mutant(
        name="deaf_to_wait",
        worker_type=states.deaf_to(PauseMode.WAIT),
        caught_by="core.pause_wait",
        also=ids("flush_cache"),
    ),
    Mutant(name="deaf_to_keep", worker_type=states.deaf_to(PauseMode.KEEP), caught_by="core.pause_keep"),
    Mutant(name="deaf_to_retract", worker_type=states.deaf_to(PauseMode.RETRACT), caught_by="core.pause_retract"),
)
