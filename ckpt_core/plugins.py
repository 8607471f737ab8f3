"""Finding an engine's plugin by name and checking that it keeps the contract before anything is called."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from ckpt_core import hookspecs
from ckpt_core.capability import Capability
from ckpt_core.contract import CONTRACT_VERSION, EngineInfo
from ckpt_core.errors import CapabilityMismatch, PluginIncompatible, PluginNotFound

ENTRY_POINT_GROUP = "ckpt_core.engines"

_HOOKS_OF: dict[Capability, tuple[str, ...]] = {
    Capability.SNAPSHOT: ("ckpt_snapshot", "ckpt_restore"),
    Capability.LIVE_READ: ("ckpt_live",),
    Capability.POISON_GUARD: ("ckpt_poison",),
    Capability.PAUSE_ABORT: ("ckpt_pause", "ckpt_resume"),
    Capability.PAUSE_WAIT: ("ckpt_pause", "ckpt_resume"),
    Capability.PAUSE_KEEP: ("ckpt_pause", "ckpt_resume"),
    Capability.PAUSE_RETRACT: ("ckpt_pause", "ckpt_resume"),
    Capability.FLUSH_CACHE: ("ckpt_flush_cache",),
    Capability.SLEEP: ("ckpt_wake",),
}


class EnginePlugin:
    """One checked plugin.

    Attributes:
        info: what it says of itself.
        hook: its hooks; a hook it does not have returns None.
    """

    def __init__(self, implementation: Any, *, name: str) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        _check_names(implementation, name)
        try:
            self._manager.register(implementation, name=name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginIncompatible(
                f"plugin {name!r} does not match the hook specification: {error}; see ckpt_core/hookspecs.py"
            ) from error
        self.hook = self._manager.hook
        self._check_required(name)
        try:
            self.info: EngineInfo = self.hook.ckpt_engine_info()
        except Exception as error:
            raise PluginIncompatible(
                f"plugin {name!r}: ckpt_engine_info() raised {error!r}; it must only tell"
            ) from error
        self._check_info(name)

    def has(self, hook: str) -> bool:
        """Whether the plugin implements that hook."""
        return bool(getattr(self.hook, hook).get_hookimpls())

    def _check_required(self, name: str) -> None:
        if absent := sorted(hook for hook in hookspecs.REQUIRED if not self.has(hook)):
            raise PluginIncompatible(
                f"plugin {name!r} lacks required hooks: {', '.join(absent)}; write them, or check their spelling"
            )

    def _check_info(self, name: str) -> None:
        if not isinstance(self.info, EngineInfo) or self.info.name != name:
            raise PluginIncompatible(
                f"plugin {name!r}: ckpt_engine_info() must return an EngineInfo with name={name!r}, got {self.info!r}"
            )
        if self.info.contract != CONTRACT_VERSION:
            newer = "ckpt-core" if self.info.contract > CONTRACT_VERSION else "plugin"
            raise PluginIncompatible(
                f"plugin {name!r} was written for version {self.info.contract} of the contract, this ckpt-core has "
                f"{CONTRACT_VERSION}; install a newer {newer}"
            )
        for capability, hooks in _HOOKS_OF.items():
            absent = [hook for hook in hooks if not self.has(hook)]
            if self.info.support(capability).usable and absent:
                raise CapabilityMismatch(
                    f"plugin {name!r} claims {capability.name} without {', '.join(absent)}; write the hook or declare the "
                    "capability not_implemented with a reason"
                )


def names() -> tuple[str, ...]:
    """Names of the installed engine plugins, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)}))


@cache  # to look for entry points takes 10 ms, and ranks ask while their engine stands still
def load(name: str) -> EnginePlugin:
    """Load, check and return the plugin of that engine; once in a process.

    Raises:
        PluginNotFound: none is installed under that name.
        PluginIncompatible: it cannot be imported, or its hooks do not match the specification.
        CapabilityMismatch: it claims a capability without the hook it needs.
    """
    return EnginePlugin(_module(_entry_point(name)), name=name)


def _entry_point(name: str) -> EntryPoint:
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return point
    raise PluginNotFound(
        f"no plugin for engine {name!r}; installed: {', '.join(names()) or 'none'}; install the package that provides it"
    )


def _module(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise PluginIncompatible(f"plugin {point.name!r} ({point.value}) cannot be imported: {error!r}") from error


def _check_names(implementation: Any, name: str) -> None:
    """A function named like a hook but without the marker is never called: say so instead of passing it over."""
    for attribute in dir(implementation):
        if not attribute.startswith(f"{hookspecs.PROJECT}_"):
            continue
        function = getattr(implementation, attribute)
        if callable(function) and not hasattr(function, f"{hookspecs.PROJECT}_impl"):
            raise PluginIncompatible(
                f"plugin {name!r}: {attribute} is not marked with @hookimpl and would never be called; mark or rename it"
            )
