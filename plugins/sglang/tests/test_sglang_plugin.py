"""The plugin by itself, where SGLang is not installed: it loads, and imports neither SGLang nor torch."""

import json
import subprocess
import sys

import pytest
import torch

from ckpt_core import plugins
from ckpt_core.capability import Capability
from ckpt_core.config import child_environment
from ckpt_core.contract import LiveState
from ckpt_core.plugins import EnginePlugin
from ckpt_sglang import plugin
from ckpt_sglang.live import live_tensors, processed_modules

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


@pytest.mark.parametrize(
    ("method", "device", "pure"),
    [
        ("UnquantizedLinearMethod", "cpu", True),
        ("UnquantizedLinearMethod", "meta", True),
        ("UnquantizedEmbeddingMethod", "meta", True),
        ("UnquantizedFusedMoEMethod", "cpu", True),
        ("UnquantizedFusedMoEMethod", "meta", False),
        ("Fp8LinearMethod", "meta", False),
    ],
)
def test_which_weights_are_as_they_were_loaded(method, device, pure):
    layer = torch.nn.Linear(2, 2, bias=False, device=device)
    layer.quant_method = type(method, (), {})()
    (live,) = live_tensors(layer).values()
    assert (live.state is LiveState.PURE) is pure
    assert (not processed_modules(layer)) is pure


def test_weights_packed_for_a_matrix_unit_are_not_as_they_were_loaded():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.quant_method = type("UnquantizedLinearMethod", (), {})()
    layer.use_intel_amx_backend = True
    assert processed_modules(layer)
