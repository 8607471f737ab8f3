"""The plugin by itself, where SGLang is not installed: it loads, and imports neither SGLang nor torch."""

import json
import subprocess
import sys

from ckpt_core import plugins
from ckpt_core.capability import Capability
from ckpt_core.config import child_environment
from ckpt_core.plugins import EnginePlugin
from ckpt_sglang import plugin

LIGHT = """
import json, sys
import ckpt_sglang.plugin as plugin
plugin.ckpt_engine_info()
print(json.dumps([name for name in ("torch", "sglang", "httpx") if name in sys.modules]))
"""


def test_is_found_by_name_and_keeps_the_contract():
    assert "sglang" in plugins.names()
    assert plugins.load("sglang").info.name == "sglang"


def test_tells_every_capability():
    info = EnginePlugin(plugin, name="sglang").info
    assert set(info.capabilities) == set(Capability)


def test_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True, env=child_environment()
    )
    assert json.loads(done.stdout) == []
