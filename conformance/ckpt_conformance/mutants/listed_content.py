"""Mutants that write the wrong thing, or into the wrong place."""

from __future__ import annotations

from ckpt_conformance.mutants import contents, hooks, workers
from ckpt_conformance.mutants.hooks import variant
from ckpt_conformance.mutants.mutant import Mutant, ids

CONTENT_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="skipped_last_bucket",
        worker_type=workers.SkippedLastBucket,
        caught_by="core.live_equals_fresh",
        also=ids(
            "any_bucket_size",
            "any_order",
            "draft_model",
            "flush_cache",
            "group_lands_together",
            "odd_sizes",
            "packed_experts",
            "partial_update",
            "repeated_tensor",
            "scalar_and_empty",
            "sharded.sharded_slices",
            "sleep_and_wake",
            "tied_weights",
        ),
    ),
    Mutant(name="forgotten_tied_copy", worker_type=workers.ForgottenTiedCopy, caught_by="core.tied_weights"),
    Mutant(
        name="swapped_gate_and_up",
        worker_type=contents.SwappedGateAndUp,
        caught_by="core.packed_experts",
        also=ids("partial_update", "group_lands_together"),
    ),
    Mutant(
        name="stale_scale",
        worker_type=workers.StaleScale,
        caught_by="core.quantised_weights",
        also=ids("group_lands_together", "partial_update"),
    ),
    Mutant(name="rounded_down", worker_type=contents.RoundedDown, caught_by="core.odd_sizes"),
    Mutant(name="draft_forgotten", worker_type=contents.DraftForgotten, caught_by="core.draft_model"),
    Mutant(name="scalars_forgotten", worker_type=contents.ScalarsForgotten, caught_by="core.scalar_and_empty"),
    Mutant(name="wrong_qkv_slice", worker_type=workers.WrongSlice, caught_by="sharded.sharded_slices"),
    Mutant(
        name="already_there",
        worker_type=workers.AlreadyThere,
        caught_by="core.second_update_same",
        also=ids("any_bucket_size", "any_order", "transactional.update_after_abort"),
    ),
    Mutant(name="version_cache", worker_type=contents.VersionCache, caught_by="core.there_and_back"),
    Mutant(name="appending", worker_type=contents.Appending, caught_by="core.any_order"),
    Mutant(name="kept_view", worker_type=workers.KeptView, caught_by="core.no_view_kept"),
    Mutant(name="written_bucket", worker_type=workers.WrittenBucket, caught_by="core.bucket_not_written"),
    Mutant(name="new_storage_on_finish", worker_type=workers.NewStorage, caught_by="core.addresses_stable"),
    Mutant(name="leak", worker_type=workers.Leak, caught_by="core.no_growth"),
    Mutant(name="dropped_unknown_name", worker_type=workers.DroppedUnknownName, caught_by="core.unknown_name_reported"),
    Mutant(name="nobody_counts", worker_type=workers.NobodyCounts, caught_by="core.missing_name_reported"),
    Mutant(
        name="casting",
        worker_type=contents.Casting,
        implementation=variant(ckpt_layout=hooks.unnamed_mismatches),
        caught_by="core.misfit_refused",
        also=ids("layout_names_mismatched"),
    ),
    Mutant(name="counted_only", worker_type=contents.CountedOnly, caught_by="core.repeated_tensor"),
    Mutant(
        name="reset_norms",
        worker_type=contents.ResetNorms,
        caught_by="core.partial_update",
        also=ids("group_lands_together"),
    ),
    Mutant(name="emptied_parts", worker_type=contents.EmptiedParts, caught_by="core.group_lands_together"),
    Mutant(name="snapshot_of_views", worker_type=workers.SnapshotOfViews, caught_by="transactional.snapshot_exact"),
    Mutant(name="stale_cache", worker_type=workers.StaleCache, caught_by="core.flush_cache"),
)
