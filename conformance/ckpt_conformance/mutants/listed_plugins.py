"""Mutants whose bug is in a hook of the plugin."""

from __future__ import annotations

from ckpt_conformance.mutants import hooks
from ckpt_conformance.mutants.hooks import variant
from ckpt_conformance.mutants.mutant import Mutant, ids

PLUGIN_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="changing_info",
        implementation=variant(ckpt_engine_info=hooks.changing_info),
        caught_by="core.plugin_loads",
    ),
    Mutant(
        name="unexplained_capability",
        implementation=variant(ckpt_engine_info=hooks.unexplained_info),
        caught_by="core.capabilities_explained",
    ),
    Mutant(
        name="eager_plugin",
        plugin_module="ckpt_conformance.mutants.eager_plugin",
        caught_by="core.info_without_engine",
    ),
    Mutant(
        name="new_identity",
        implementation=variant(ckpt_identify=hooks.new_identity),
        caught_by="core.identify_stable",
    ),
    Mutant(
        name="moving_layout",
        implementation=variant(ckpt_layout=hooks.moving_layout),
        caught_by="core.layout_touches_nothing",
        also=ids("addresses_stable"),
    ),
    Mutant(
        name="padded_shapes",
        implementation=variant(ckpt_layout=hooks.padded_shapes),
        caught_by="core.layout_fits",
    ),
    Mutant(
        name="impure_layout",
        implementation=variant(ckpt_layout=hooks.impure_layout),
        caught_by="core.layout_pure",
    ),
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
        name="unnamed_missing_in_a_session",
        implementation=variant(ckpt_layout=hooks.unnamed_missing),
        caught_by="core.misfit_leaves_clean",
        also=ids("layout_names_missing"),
    ),
    Mutant(
        name="unnamed_mismatches",
        implementation=variant(ckpt_layout=hooks.unnamed_mismatches),
        caught_by="core.layout_names_mismatched",
    ),
    Mutant(
        name="false_cut",
        implementation=variant(ckpt_layout=hooks.false_cut),
        caught_by="sharded.tensor_larger_than_slot",
    ),
    Mutant(
        name="forgetful_report",
        implementation=variant(ckpt_load=hooks.forgetful_report),
        caught_by="core.report_accounts_for_all",
    ),
    Mutant(
        name="sixteen_buckets",
        implementation=variant(ckpt_load=hooks.sixteen_buckets),
        caught_by="core.any_bucket_size",
    ),
    Mutant(
        name="live_copies",
        implementation=variant(ckpt_live=hooks.live_copies),
        caught_by="verified.live_read_complete",
    ),
    Mutant(
        name="constant_checksum",
        implementation=variant(ckpt_live=hooks.live_as_first_seen()),
        caught_by="verified.fingerprint_follows_content",
        also=ids("verified.live_read_complete"),
    ),
    Mutant(
        name="recorded_twin",
        implementation=variant(ckpt_recording_target=hooks.recorded_twin),
        caught_by="verified.wrong_joiner_found",
    ),
)
