"""What a mutant is, and whether the right checks fail on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from ckpt_conformance.checks.registry import Check, load_all
from ckpt_conformance.levels import Level, Tier
from ckpt_conformance.mutants.hooks import variant
from ckpt_conformance.reference.harness import ReferenceHarness
from ckpt_conformance.reference.worker import Worker
from ckpt_conformance.report import Status
from ckpt_conformance.runner import Runner, select


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A variant of the reference engine with one bug.

    Attributes:
        caught_by: the check that is there for this bug.
        also: checks that the bug breaks, too, and that may fail.
        worker_type, implementation, plugin_module, server_prefix, rank_plugin: what is another in its harness; see there.
    """

    name: str
    caught_by: str
    also: frozenset[str] = frozenset()
    worker_type: type[Worker] = Worker
    implementation: SimpleNamespace = field(default_factory=variant)
    plugin_module: str = ""
    server_prefix: tuple[str, ...] = ()
    rank_plugin: str = ""

    def harness(self) -> ReferenceHarness:
        """The reference's harness, with the bug."""
        made = ReferenceHarness(
            self.worker_type, self.implementation, server_prefix=self.server_prefix, rank_plugin=self.rank_plugin
        )
        made.plugin_module = self.plugin_module or made.plugin_module
        return made


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
    """Checks of a worker, and the one that must catch it; of a server, whose workers are sound, only that one."""
    (own,) = (check for check in load_all() if check.check_id == mutant.caught_by)
    if own.tier is Tier.SERVER:
        return [own]
    others = [check for check in select(Level.SHARDED, (Tier.WORKER,)) if check is not own]
    return [*others, own]


def ids(*names: str) -> frozenset[str]:
    """Ids of checks; "core." may be left out."""
    return frozenset(name if "." in name else f"core.{name}" for name in names)
