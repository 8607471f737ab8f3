"""The plugin by itself: it loads, matches the specification, and describes itself without its engine."""

from __future__ import annotations

import json
import subprocess
import sys

from ckpt_conformance.bench import Bench
from ckpt_conformance.checks.registry import CheckFailed, check
from ckpt_conformance.levels import Tier
from ckpt_core.capability import Capability, Level
from ckpt_core.config import child_environment

_TIMEOUT_S = 60.0
_PROBE = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
module.ckpt_engine_info()
print(json.dumps(sorted(name for name in sys.argv[2:] if name in sys.modules)))
"""


@check(
    "plugin_loads",
    tier=Tier.STATIC,
    rule="A plugin has every required hook, by its exact name and arguments, and a capability's hooks where it claims it.",
    usual_cause="A misspelt hook or argument, or a missing @hookimpl.",
)
def plugin_loads(bench: Bench) -> None:
    """The runner loaded it already with all checks of names; here it must do so again, and say the same."""
    again = bench.harness.plugin().info
    if again != bench.plugin.info:
        raise CheckFailed(expected=f"the same info at every load: {bench.plugin.info}", got=str(again))


@check(
    "capabilities_explained",
    tier=Tier.STATIC,
    rule="Every capability has a level, and where it is not usable a reason; where it starts at a version, the version.",
    usual_cause="A new member of the enum that the plugin does not declare yet.",
)
def capabilities_explained(bench: Bench) -> None:
    """UNKNOWN is no declaration."""
    for capability in Capability:
        support = bench.plugin.info.support(capability)
        if support.level is not Level.FULL and not support.detail:
            raise CheckFailed(
                expected=f"{capability.name} with a reason or a version", got=f"{support.level.value} without"
            )


@check(
    "info_without_engine",
    tier=Tier.STATIC,
    rule="ckpt_engine_info works in any process and does not import the engine, nor torch.",
    usual_cause="An import of the engine at the top of the plugin's module.",
)
def info_without_engine(bench: Bench) -> None:
    """In a process of its own: this one has the engine already."""
    harness = bench.harness
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, harness.plugin_module, *harness.engine_modules],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env=child_environment(),
    )
    if done.returncode:
        raise CheckFailed(expected="info in a process without the engine", got=done.stderr.strip()[-2000:])
    if imported := json.loads(done.stdout.splitlines()[-1]):
        raise CheckFailed(expected="none of the engine's modules imported", got=", ".join(imported))
