"""The plugin by itself: versions, claims, and imports."""

import subprocess
import sys

import pytest

from ckpt_core import plugins
from ckpt_core.capability import Capability
from ckpt_core.errors import ConfigError
from ckpt_vllm import compat, control, plugin
from ckpt_vllm.launch import VllmServer


def test_the_plugin_loads_with_every_hook_it_claims():
    loaded = plugins.EnginePlugin(plugin, name="vllm")
    assert loaded.info.support(Capability.POISON_GUARD).usable
    assert {capability for capability in Capability if not loaded.info.support(capability).detail} <= {
        capability for capability in Capability if loaded.info.support(capability).usable
    }


def test_versions_that_were_run_are_silent_and_others_are_not():
    assert compat.version_warning(None) == ""
    assert all(compat.version_warning(version) == "" for version in compat.RAN_VERSIONS)
    assert "ckpt-conformance" in compat.version_warning("0.99.0")


def test_the_local_part_of_a_version_does_not_count(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.32.0+cpu")
    assert compat.engine_version() == "0.32.0"


def test_neither_torch_nor_vllm_is_imported():
    code = "import sys, ckpt_vllm.plugin as p; p.ckpt_engine_info(); print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_every_pause_mode_has_a_mode_of_vllm():
    from ckpt_core.contract import PauseMode

    assert set(control.PAUSE) == set(PauseMode)


def test_an_unknown_handle_is_refused():
    from ckpt_vllm.in_process import handle_of

    with pytest.raises(ConfigError, match="AsyncHandle"):
        handle_of(object())


def test_a_server_that_cannot_start_leaves_no_process(tmp_path):
    """The real launcher, and an interpreter without vLLM."""
    from ckpt_core.errors import EngineUnavailable

    broken = VllmServer(tmp_path, environment={"PYTHONPATH": str(tmp_path)}, start_timeout_s=30.0)
    (tmp_path / "vllm.py").write_text("raise SystemExit('broken on purpose')")
    with pytest.raises(EngineUnavailable, match="broken on purpose"), broken:
        pass
    assert broken._process.poll() is not None
