"""Runs checks on a harness and collects what came out."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeAlias

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.checkpoints import CheckpointStore
from ckpt_conformance.checks.registry import Check, CheckFailed, load_all
from ckpt_conformance.harness import Harness, NotOffered
from ckpt_conformance.kept_server import KeptServer
from ckpt_conformance.levels import Level, ModelKind, Tier
from ckpt_conformance.report import Failure, Report, Result, Status, capability_rows
from ckpt_core.errors import ConfigError, PluginNotFound
from ckpt_core.plugins import EnginePlugin

ENTRY_POINT_GROUP = "ckpt_core.conformance"
_TRACE_LINES = 12
RunCheck: TypeAlias = Callable[[Check], Result]
_BenchOf: TypeAlias = Callable[[ModelKind], Bench]


def find_harness(engine: str, location: str = "") -> Harness:
    """The harness at `module:object`, or else the installed one of that engine.

    Raises:
        PluginNotFound: there is none.
        ConfigError: the location is no harness.
    """
    if location:
        module, _, name = location.partition(":")
        try:
            found = getattr(import_module(module), name or "harness", None)
        except ImportError as error:
            raise ConfigError(
                f"--harness {location}: {module!r} cannot be imported ({error}); check the name"
            ) from error
    else:
        points = entry_points(group=ENTRY_POINT_GROUP)
        found = next((point.load() for point in points if point.name == engine), None)
        if found is None:
            installed = ", ".join(sorted(point.name for point in points)) or "none"
            raise PluginNotFound(
                f"no conformance harness for engine {engine!r}; installed: {installed}; declare one under the entry-point "
                f"group {ENTRY_POINT_GROUP}, or name it with --harness module:object"
            )
    if not isinstance(found, Harness):
        raise ConfigError(f"--harness {location or engine}: expected an instance of Harness, got {found!r}")
    return found


def select(level: Level, tiers: Sequence[Tier] = (), check_ids: Sequence[str] = ()) -> list[Check]:
    """Checks up to a level, in some tiers (or all); or those with some ids, whatever their level.

    Raises:
        ConfigError: an id that does not exist.
    """
    checks = load_all()
    if unknown := sorted(set(check_ids) - {check.check_id for check in checks}):
        raise ConfigError(f"no check is named {', '.join(unknown)}; see ckpt-conformance --list")
    return [
        check
        for check in checks
        if (check.check_id in check_ids if check_ids else check.level <= level) and (not tiers or check.tier in tiers)
    ]


class Runner:
    """One run of checks on one harness.

    Args:
        try_all: run checks of capabilities that are not claimed, too.
        on_result: told each result as it comes.
    """

    def __init__(
        self, harness: Harness, *, try_all: bool = False, on_result: Callable[[Result], None] | None = None
    ) -> None:
        self._harness = harness
        self._try_all = try_all
        self._on_result = on_result or (lambda _: None)

    @contextmanager
    def opened(self) -> Iterator[RunCheck]:
        """What runs one check; the plugin is loaded once, and checkpoints are made once, in a directory that is removed.

        Raises:
            PluginError: the plugin cannot be loaded; no check can run.
            ConfigError: a known failure of a check that does not exist.
        """
        _check_known(self._harness)
        plugin = self._harness.plugin()
        with tempfile.TemporaryDirectory(prefix="ckpt-conformance-") as directory:
            store = CheckpointStore(self._harness, Path(directory))
            with closing(KeptServer()) as kept:
                bench_of = partial(Bench, self._harness, plugin, store=store, kept=kept)
                yield lambda check: self._run_one(check, plugin, bench_of)

    def run(self, checks: Sequence[Check]) -> Report:
        """Run them all.

        Raises:
            PluginError, ConfigError: see `opened`.
        """
        results = []
        with self.opened() as run_check:
            for check in checks:
                results.append(run_check(check))
                self._on_result(results[-1])
        info = self._harness.plugin().info
        return Report(
            engine=info.name,
            plugin_version=info.plugin_version,
            engine_version=info.engine_version or "",
            results=tuple(results),
            capabilities=capability_rows(info, results),
        )

    def _run_one(self, check: Check, plugin: EnginePlugin, bench_of: _BenchOf) -> Result:
        start = time.perf_counter()
        status, reason, failure = self._judge(check, plugin, bench_of)
        return Result(check=check, status=status, reason=reason, failure=failure, seconds=time.perf_counter() - start)

    def _judge(self, check: Check, plugin: EnginePlugin, bench_of: _BenchOf) -> tuple[Status, str, Failure | None]:
        if why := self._why_not(check, plugin):
            return Status.SKIPPED, why, None
        known = self._harness.known_failures.get(check.check_id)
        reason = ""
        for kind in (kind for kind in check.kinds if kind in self._harness.kinds):
            try:
                failure = _attempt(check, bench_of(kind))
            except NotOffered as absent:
                reason = f"the harness does not offer {absent}"
                continue
            if failure is not None:
                return (Status.KNOWN, known, failure) if known else (Status.FAILED, "", failure)
        if reason:
            return Status.SKIPPED, reason, None
        return (Status.STALE, f"passes, but is a known failure: {known}", None) if known else (Status.PASSED, "", None)

    def _why_not(self, check: Check, plugin: EnginePlugin) -> str:
        for capability in sorted(check.needs, key=lambda needed: needed.value):
            support = plugin.info.support(capability)
            if not support.usable and not self._try_all:
                return f"{capability.name} is {support.level.value}: {support.detail or 'no reason given'}"
        if not any(kind in self._harness.kinds for kind in check.kinds):
            return f"the harness has no model of kind {' or '.join(kind.value for kind in check.kinds)}"
        return ""


def _check_known(harness: Harness) -> None:
    if unknown := sorted(set(harness.known_failures) - {check.check_id for check in load_all()}):
        raise ConfigError(
            f"known_failures of {harness.engine!r} names {', '.join(unknown)}: no such check; strike it off"
        )


def _attempt(check: Check, bench: Bench) -> Failure | None:
    try:
        with bench:
            check.function(bench)
    except NotOffered:
        raise
    except CheckFailed as failed:
        return Failure(
            expected=failed.expected, got=failed.got, tensor=failed.tensor, rank=failed.rank, model=bench.kind.value
        )
    except Exception as error:  # noqa: BLE001 whatever an engine raises is a result, and the next check must run
        lines = "".join(traceback.format_exception(error)).splitlines()[-_TRACE_LINES:]
        return Failure(
            expected="no error here",
            got=f"{type(error).__name__}: {error}",
            model=bench.kind.value,
            trace="\n".join(lines),
        )
    return None
