"""Every mutant, the check that must catch it, and the checks that may fail beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from ckpt_conformance.checks.registry import Check
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.mutants import hooks, workers
from ckpt_conformance.mutants.hooks import variant
from ckpt_conformance.reference.harness import ReferenceHarness
from ckpt_conformance.reference.worker import Worker
from ckpt_conformance.report import Status
from ckpt_conformance.runner import Runner, select

_TIERS = (Tier.WORKER,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A variant of the reference engine with one bug.

    Attributes:
        caught_by: the check that is there for this bug.
        also: checks that the bug breaks, too, and that may fail.
    """

    name: str
    caught_by: str
    worker_type: type[Worker] = Worker
    implementation: SimpleNamespace = field(default_factory=variant)
    also: frozenset[str] = frozenset()

    def harness(self) -> ReferenceHarness:
        """The reference's harness, with the bug."""
        return ReferenceHarness(self.worker_type, self.implementation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the right checks failed. `failed` by id; `text` for people."""

    ok: bool
    failed: frozenset[str]
    text: str
    seconds: float


def run_mutant(mutant: Mutant) -> Verdict:
    """Run the checks of a worker on a mutant, and its own check in whatever tier that is."""
    report = Runner(mutant.harness()).run(checks_for(mutant))
    seconds = sum(result.seconds for result in report.results)
    failed = frozenset(result.check.check_id for result in report.results if result.status is Status.FAILED)
    surplus = sorted(failed - mutant.also - {mutant.caught_by})
    if mutant.caught_by not in failed:
        text = f"{mutant.caught_by} passes; failed: {sorted(failed) or 'none'}"
    elif surplus:
        text = f"by {mutant.caught_by}, but also by {', '.join(surplus)}"
    else:
        text = f"by {', '.join([mutant.caught_by, *sorted(failed - {mutant.caught_by})])}"
    return Verdict(ok=mutant.caught_by in failed and not surplus, failed=failed, text=text, seconds=seconds)


def checks_for(mutant: Mutant) -> Sequence[Check]:
    """Checks of a worker, and the one that must catch it."""
    checks = select(Level.CORE, _TIERS)
    return (
        checks
        if any(check.check_id == mutant.caught_by for check in checks)
        else [
            *checks,
            *select(Level.CORE, (), (mutant.caught_by,)),
        ]
    )


def _core(*names: str) -> frozenset[str]:
    return frozenset(f"core.{name}" for name in names)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="swallowed_finish_error",
        worker_type=workers.SwallowedFinishError,
        caught_by="core.finish_failure_surfaces",
    ),
    Mutant(name="swallowed_load_error", worker_type=workers.SwallowedLoadError, caught_by="core.load_failure_surfaces"),
    Mutant(
        name="swallowed_finish_error_in_a_session",
        worker_type=workers.SwallowedFinishError,
        caught_by="core.failed_update_is_silent",
        also=_core("finish_failure_surfaces"),
    ),
    Mutant(
        name="skipped_last_bucket",
        worker_type=workers.SkippedLastBucket,
        caught_by="core.live_equals_fresh",
        also=_core(
            "any_bucket_size",
            "any_order",
            "flush_cache",
            "group_lands_together",
            "odd_sizes",
            "packed_experts",
            "partial_update",
            "repeated_tensor",
            "sharded_slices",
            "sleep_and_wake",
            "tied_weights",
        ),
    ),
    Mutant(name="kept_view", worker_type=workers.KeptView, caught_by="core.no_view_kept"),
    Mutant(name="written_bucket", worker_type=workers.WrittenBucket, caught_by="core.bucket_not_written"),
    Mutant(name="wrong_qkv_slice", worker_type=workers.WrongSlice, caught_by="core.sharded_slices"),
    Mutant(
        name="stale_scale",
        worker_type=workers.StaleScale,
        caught_by="core.quantised_weights",
        also=_core("group_lands_together", "partial_update"),
    ),
    Mutant(name="forgotten_tied_copy", worker_type=workers.ForgottenTiedCopy, caught_by="core.tied_weights"),
    Mutant(name="new_storage_on_finish", worker_type=workers.NewStorage, caught_by="core.addresses_stable"),
    Mutant(name="lying_abort", worker_type=workers.LyingAbort, caught_by="core.abort_honest"),
    Mutant(
        name="sticky_flag",
        worker_type=workers.StickyFlag,
        caught_by="core.update_after_abort",
        also=_core("snapshot_exact"),
    ),
    Mutant(name="double_begin", worker_type=workers.DoubleBegin, caught_by="core.begin_refused_while_updating"),
    Mutant(name="sleepy_begin", worker_type=workers.SleepyBegin, caught_by="core.begin_refused_while_asleep"),
    Mutant(name="dropped_unknown_name", worker_type=workers.DroppedUnknownName, caught_by="core.unknown_name_reported"),
    Mutant(name="nobody_counts", worker_type=workers.NobodyCounts, caught_by="core.missing_name_reported"),
    Mutant(
        name="poison_ignored",
        worker_type=workers.PoisonIgnored,
        caught_by="core.poison_guard",
        also=_core("poison_outlives_update"),
    ),
    Mutant(
        name="poison_cleared_by_finish",
        worker_type=workers.PoisonClearedByFinish,
        caught_by="core.poison_outlives_update",
    ),
    Mutant(name="leak", worker_type=workers.Leak, caught_by="core.no_growth"),
    Mutant(name="snapshot_of_views", worker_type=workers.SnapshotOfViews, caught_by="core.snapshot_exact"),
    Mutant(
        name="already_there",
        worker_type=workers.AlreadyThere,
        caught_by="core.second_update_same",
        also=_core("any_bucket_size", "any_order", "update_after_abort"),
    ),
    Mutant(name="stale_cache", worker_type=workers.StaleCache, caught_by="core.flush_cache"),
    Mutant(name="version_not_told", worker_type=workers.VersionNotTold, caught_by="core.version_told"),
    Mutant(name="wait_forgotten", worker_type=workers.WaitForgotten, caught_by="core.initial_weights"),
    Mutant(name="deaf_pause", worker_type=workers.DeafPause, caught_by="core.pause_keep"),
    Mutant(
        name="unnamed_unknowns",
        implementation=variant(ckpt_layout=hooks.unnamed_unknowns),
        caught_by="core.layout_names_unknown",
    ),
    Mutant(
        name="unnamed_missing",
        implementation=variant(ckpt_layout=hooks.unnamed_missing),
        caught_by="core.layout_names_missing",
    ),
    Mutant(
        name="moving_layout",
        implementation=variant(ckpt_layout=hooks.moving_layout),
        caught_by="core.layout_touches_nothing",
        also=_core("addresses_stable"),
    ),
    Mutant(
        name="forgetful_report",
        implementation=variant(ckpt_load=hooks.forgetful_report),
        caught_by="core.report_accounts_for_all",
    ),
    Mutant(
        name="live_copies", implementation=variant(ckpt_live=hooks.live_copies), caught_by="core.live_read_complete"
    ),
    Mutant(
        name="unexplained_capability",
        implementation=variant(ckpt_engine_info=hooks.unexplained_info),
        caught_by="core.capabilities_explained",
    ),
)
