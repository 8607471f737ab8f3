"""Nothing in the core or in a plugin turns outside bytes into objects of any class: no pickle anywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ckpt_core", "plugins/vllm/ckpt_vllm", "plugins/sglang/ckpt_sglang", "plugins/trtllm/ckpt_trtllm")

MODULES = frozenset(
    {
        "_pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "multiprocessing.connection",
        "multiprocessing.managers",
        "pickle",
        "shelve",
        "torch.multiprocessing",
        "torch.package",
    }
)
# by their dotted end, whatever the module is called locally
CALLS = (
    "torch.load",
    "torch.save",
    "numpy.load",
    "np.load",
    "jsonpickle.decode",
    "yaml.load",
    "yaml.unsafe_load",
)
# collectives and sockets of other libraries that pickle under the bonnet
METHODS = frozenset(
    {
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "recv_object_list",
        "recv_pyobj",
        "scatter_object_list",
        "send_object_list",
        "send_pyobj",
    }
)
# queues, pipes and managers between processes pickle what they carry
MULTIPROCESSING = frozenset({"Connection", "Listener", "Manager", "Pipe", "Pool", "Queue", "SimpleQueue"})


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def under(name: str, modules: frozenset[str]) -> bool:
    """Whether a dotted name is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def finding(node: ast.AST) -> str | None:
    """What a node does that it must not; None where it is harmless."""
    match node:
        case ast.Import(names=names):
            wrong = [alias.name for alias in names if under(alias.name, MODULES)]
        case ast.ImportFrom(module=str(module), names=names):
            full = [f"{module}.{alias.name}" for alias in names]
            by_name = METHODS | MULTIPROCESSING if module.split(".")[0] == "multiprocessing" else METHODS
            wrong = [name for name in full if under(name, MODULES) or name in CALLS]
            wrong += [f"{module}.{alias.name}" for alias in names if alias.name in by_name]
        case ast.Attribute(attr=attribute):
            dotted = ast.unparse(node)
            wrong = [dotted] if dotted in CALLS or under(dotted, MODULES) or attribute in METHODS else []
            if dotted.split(".")[0] in ("multiprocessing", "mp") and attribute in MULTIPROCESSING:
                wrong.append(dotted)
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            wrong = ["allow_pickle=True"]
        case ast.Constant(value=str(text)) if text in MODULES - {"torch.package"}:
            wrong = [f"the name {text!r}, as import_module takes it"]
        case _:
            wrong = []
    return f"line {getattr(node, 'lineno', '?')}: {', '.join(wrong)}" if wrong else None


def findings(source: str) -> list[str]:
    return [found for node in ast.walk(ast.parse(source)) if (found := finding(node))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle(path: Path) -> None:
    assert not findings(path.read_text()), f"{path.relative_to(ROOT)} unpickles; use the schema of wire.py"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from multiprocessing.connection import Client",
        "import multiprocessing.connection",
        "from multiprocessing import connection, Pipe",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "numpy.load(path, allow_pickle=True)",
        "socket.recv_pyobj()",
        "torch.distributed.broadcast_object_list(parts)",
        "from torch.distributed import all_gather_object",
        "importlib.import_module('pickle')",
        "multiprocessing.Queue()",
        "from torch.multiprocessing import reductions",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    ["import json", "safetensors.torch.load(data)", "layer.load(path)", "from torch import nn", "x = 'load'"],
)
def test_the_search_lets_pass(source: str) -> None:
    assert not findings(source)
