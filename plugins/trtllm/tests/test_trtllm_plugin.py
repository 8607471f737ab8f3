"""The plugin by itself, where TensorRT-LLM is not installed."""

import json
import subprocess
import sys

import pytest

from ckpt_core.capability import Capability
from ckpt_core.config import child_environment
from ckpt_core.plugins import EnginePlugin
from ckpt_trtllm import compat, extension, plugin
from ckpt_trtllm.calls import RankCalls, WaitingRankCalls, own_plugin
from ckpt_trtllm.harness import TrtllmHarness
from ckpt_trtllm.standin.worker import StandInWorker, with_extension

LIGHT = """
import json, sys
import ckpt_trtllm.plugin as plugin
import ckpt_trtllm.extension as extension
plugin.ckpt_engine_info()
extension.CkptWorkerExtension
print(json.dumps([name for name in ("torch", "tensorrt_llm", "httpx") if name in sys.modules]))
"""


def test_tells_every_capability_and_that_it_was_never_run_on_the_engine():
    info = EnginePlugin(plugin, name="trtllm").info
    assert set(info.capabilities) == set(Capability)
    for support in info.capabilities.values():
        assert not support.usable or "never on the engine" in support.detail


def test_is_found_without_being_installed_under_its_name():
    assert own_plugin() is own_plugin()
    assert own_plugin().info.name == "trtllm"


def test_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True, env=child_environment()
    )
    assert json.loads(done.stdout) == []


def test_every_version_is_one_it_was_never_run_on():
    assert compat.version_warning(None) == ""
    assert "ckpt-conformance --engine trtllm" in compat.version_warning("1.3.0")


def test_an_empty_package_of_that_name_is_not_the_engine(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.0.1")
    assert compat.engine_version() == "0.0.1"
    assert not compat.is_installed()
    assert compat.native_extension() is None


def test_the_engine_is_taken_where_it_is_installed_and_the_stand_in_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(compat, "is_installed", lambda: True)
    assert type(TrtllmHarness().engines).__name__ == "RealEngines"
    assert type(TrtllmHarness(stand_in=True).engines).__name__ == "StandInEngines"


class NativeExtension:
    """Has what `AsyncLLM` calls by name."""

    def update_weights(self, ipc_handles=None):
        return "native"

    def wait_for_engine_idle(self):
        return "idle"


@pytest.fixture
def with_native(monkeypatch):
    extension._extension.cache_clear()
    monkeypatch.setattr(compat, "native_extension", lambda: NativeExtension)
    yield
    extension._extension.cache_clear()


def test_the_engines_own_calls_stay(with_native):
    found = extension.CkptWorkerExtension
    assert issubclass(found, RankCalls)
    assert issubclass(found, NativeExtension)
    assert issubclass(extension.WaitingWorkerExtension, WaitingRankCalls)
    assert extension.CkptWorkerExtension is found


def test_an_unknown_extension_is_named():
    with pytest.raises(AttributeError, match="WaitingWorkerExtension"):
        _ = extension.WorkerExtension


def test_no_name_of_the_extension_can_clash():
    names = [name for name in dir(extension.CkptWorkerExtension) if not name.startswith("__")]
    assert names
    assert all(name.startswith("ckpt_") for name in names)


def test_an_extension_whose_names_clash_is_refused_as_by_the_engine():
    class Worker(StandInWorker):
        def ckpt_attach(self): ...

    with pytest.raises(ValueError, match="ckpt_attach"):
        with_extension(Worker, "ckpt_trtllm.extension.CkptWorkerExtension")
