"""Plugins that break the contract are refused when they are loaded, with what to mend."""

import dataclasses
import types
from importlib.metadata import EntryPoint

import pytest

from ckpt_core import hookspecs, plugins
from ckpt_core.capability import FULL, Capability, not_implemented, versioned
from ckpt_core.contract import CONTRACT_VERSION, EngineInfo
from ckpt_core.errors import CapabilityMismatch, PluginError, PluginIncompatible, PluginNotFound
from ckpt_core.hookspecs import hookimpl
from ckpt_core.plugins import EnginePlugin


def info(name="toy", **capabilities):
    levels = {Capability[key]: level for key, level in capabilities.items()}
    return EngineInfo(name=name, plugin_version="1", engine_version=None, capabilities=levels)


def make(*, without=(), says=None, **functions):
    """A plugin module with all required hooks, changed as asked."""
    module = types.ModuleType("toy_plugin")

    @hookimpl
    def ckpt_engine_info():
        return says or info()

    @hookimpl
    def ckpt_identify(worker): ...

    @hookimpl
    def ckpt_begin(worker, update): ...

    @hookimpl
    def ckpt_load(worker, update, bucket): ...

    @hookimpl
    def ckpt_finish(worker, update): ...

    @hookimpl
    def ckpt_abort(worker, update, cause): ...

    @hookimpl
    def ckpt_ready(endpoint): ...

    @hookimpl
    def ckpt_attach(endpoint, rendezvous): ...

    hooks = {name: value for name, value in locals().items() if name.startswith("ckpt_")} | functions
    for name, hook in hooks.items():
        if name not in without:
            setattr(module, name, hook)
    return module


def load(**changes):
    return EnginePlugin(make(**changes), name="toy")


def test_the_smallest_plugin_is_taken():
    plugin = load()
    assert plugin.info.name == "toy"
    assert not plugin.has("ckpt_pause")
    assert plugin.hook.ckpt_live(worker=None) is None
    assert plugin.info.support(Capability.SLEEP).usable is False


@pytest.mark.parametrize("hook", sorted(hookspecs.REQUIRED))
def test_each_required_hook_is_missed(hook):
    with pytest.raises(PluginIncompatible, match=f"lacks required hooks: {hook}"):
        load(without={hook})


def test_a_misspelt_hook_is_refused():
    @hookimpl
    def ckpt_lode(worker, update, bucket): ...

    with pytest.raises(PluginIncompatible, match="ckpt_lode"):
        load(ckpt_lode=ckpt_lode)


def test_a_hook_without_the_marker_is_refused():
    def ckpt_pause(endpoint, mode): ...

    with pytest.raises(PluginIncompatible, match="ckpt_pause is not marked with @hookimpl"):
        load(ckpt_pause=ckpt_pause)


def test_a_hook_with_another_argument_is_refused():
    @hookimpl
    def ckpt_pause(endpoint, how): ...

    with pytest.raises(PluginIncompatible, match="how"):
        load(ckpt_pause=ckpt_pause)


def test_a_hook_may_take_fewer_arguments():
    @hookimpl
    def ckpt_pause(endpoint):
        return 3

    assert load(ckpt_pause=ckpt_pause).hook.ckpt_pause(endpoint=None, mode=None) == 3


@pytest.mark.parametrize("says", [info("other"), info(""), "toy", {"name": "toy"}], ids=str)
def test_it_must_say_its_own_name(says):
    with pytest.raises(PluginIncompatible, match=r"must return an EngineInfo with name='toy'"):
        load(says=says)


@pytest.mark.parametrize(("contract", "newer"), [(CONTRACT_VERSION + 1, "ckpt-core"), (CONTRACT_VERSION - 1, "plugin")])
def test_a_plugin_for_another_contract_is_refused(contract, newer):
    with pytest.raises(PluginIncompatible, match=f"version {contract} of the contract.*install a newer {newer}"):
        load(says=dataclasses.replace(info(), contract=contract))


def test_a_plugin_that_cannot_say_who_it_is_is_refused():
    @hookimpl
    def ckpt_engine_info():
        raise ImportError("no module named engine")

    with pytest.raises(PluginError, match="no module named engine"):
        load(ckpt_engine_info=ckpt_engine_info)


CLAIMS = {
    "SNAPSHOT": ("ckpt_snapshot", "ckpt_restore"),
    "LIVE_READ": ("ckpt_live",),
    "POISON_GUARD": ("ckpt_poison",),
    "PAUSE_ABORT": ("ckpt_pause", "ckpt_resume"),
    "PAUSE_WAIT": ("ckpt_pause", "ckpt_resume"),
    "PAUSE_KEEP": ("ckpt_pause", "ckpt_resume"),
    "PAUSE_RETRACT": ("ckpt_pause", "ckpt_resume"),
    "FLUSH_CACHE": ("ckpt_flush_cache",),
    "SLEEP": ("ckpt_wake",),
}


@pytest.mark.parametrize("level", [FULL, versioned("1.2")], ids=["full", "versioned"])
@pytest.mark.parametrize("capability", sorted(CLAIMS))
def test_a_claim_without_its_hook_is_refused(capability, level):
    with pytest.raises(CapabilityMismatch, match=f"claims {capability} without .*{CLAIMS[capability][0]}"):
        load(says=info(**{capability: level}))


@pytest.mark.parametrize("capability", sorted(CLAIMS))
def test_to_say_no_needs_no_hook(capability):
    assert (
        load(says=info(**{capability: not_implemented("later")})).info.support(Capability[capability]).detail == "later"
    )


# -- finding them ------------------------------------------------------------------------------------------------
@pytest.fixture
def installed(monkeypatch):
    """Replaces what is installed; gives the list to fill."""
    points = []
    plugins.load.cache_clear()
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [point for point in points if point.group == group])
    return points


def point(name, value):
    return EntryPoint(name=name, value=value, group=plugins.ENTRY_POINT_GROUP)


def test_nothing_installed_is_said(installed):
    assert plugins.names() == ()
    with pytest.raises(PluginNotFound, match="no plugin for engine 'vllm'; installed: none"):
        plugins.load("vllm")


def test_names_are_sorted_and_listed(installed):
    installed += [point("sglang", "a"), point("reference", "b"), point("sglang", "c")]
    assert plugins.names() == ("reference", "sglang")
    with pytest.raises(PluginNotFound, match="installed: reference, sglang"):
        plugins.load("vllm")


@pytest.mark.parametrize("value", ["no_such_module_of_any_kind", "ckpt_core.no_such", "ckpt_core.errors:no_such"])
def test_a_plugin_that_cannot_be_imported_is_a_typed_error(installed, value):
    installed.append(point("broken", value))
    with pytest.raises(PluginIncompatible, match="cannot be imported"):
        plugins.load("broken")


def test_an_object_in_a_module_is_a_plugin_too(installed, monkeypatch):
    holder = types.ModuleType("holder_of_a_toy")
    holder.toy = types.SimpleNamespace(**vars(make()))
    monkeypatch.setitem(__import__("sys").modules, "holder_of_a_toy", holder)
    installed.append(point("toy", "holder_of_a_toy:toy"))
    assert plugins.load("toy").info.name == "toy"


def test_the_reference_engine_is_installed():
    assert "reference" in plugins.names()
    assert plugins.load("reference").info.name == "reference"
