"""The modules of ckpt_core form a line: each imports only from its left. The planners import no torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "ckpt_core"

# Anyone may import these two; they know nobody but each other.
FOUNDATION = ("errors", "capability")

# Left to right. A package counts as one layer. Where a new module goes is a decision: put it here by hand.
LINE = (
    "dtypes",
    "contract",
    "files",
    "config",
    "safetensors_header",
    "source",
    "pool_file",
    "source_share",
    "manifest",
    "leaf_digest",
    "layout",
    "rows",
    "wanted",
    "strided",
    "bucket",
    "assign",
    "parts",
    "plan",
    "relay",
    "routing",
    "hookspecs",
    "plugins",
    "trace",
    "stats",
    "wire",
    "plan_parts",
    "failure",
    "process",
    "cluster",
    "channel",
    "shm",
    "polling",
    "uncollected",
    "numa",
    "device_spans",
    "device",
    "cpu",
    "cuda",
    "devices",
    "device_source",
    "limits",
    "simulate",
    "cost",
    "tracks",
    "staging",
    "pool_digests",
    "transport",
    "pipeline",
    "relaying",
    "p2p",
    "leaf_kernel",
    "checksum",
    "device_digest",
    "incoming",
    "verify",
    "ring_maps",
    "record",
    "apply",
    "rank_look",
    "per_worker",
    "guard",
    "insist",
    "snapshot",
    "worker",
    "agent",
    "agent_process",
    "host_service",
    "conversation",
    "fleet_plan",
    "flows",
    "agent_peers",
    "agents",
    "cluster_agents",
    "agreement",
    "content",
    "endpoint",
    "in_flight",
    "metrics",
    "timeline",
    "outcomes",
    "fleet",
    "boarding",
    "states",
    "owned",
    "store_records",
    "store_rows",
    "store_file",
    "membership",
    "store_owners",
    "store",
    "punch",
    "segments",
    "tensor_places",
    "segment_copy",
    "version_pool",
    "history",
    "readiness",
    "directory",
    "bearer_guard",
    "directory_server",
    "serving",
    "directory_client",
    "lease",
    "owning",
    "expected",
    "report",
    "look_report",
    "inspection",
    "look_findings",
    "looks",
    "targets",
    "staged",
    "session",
    "prediction",
    "journal",
    "going_back",
    "recovery",
    "api",
    "joining",
    "render",
    "explain",
    "cli_options",
    "cli_versions",
    "cli_looks",
    "cli_p2p",
    "cli_new_engine",
    "cli",
)
LAYERS = (*FOUNDATION, *LINE)
# the package as users see it: it may import all, nobody inside imports it
FACE = ("__init__", "__main__")

# Run on a controller without a GPU: the planners, and what speaks with the engines.
TORCHLESS = (
    "dtypes",
    "source",
    "manifest",
    "layout",
    "wanted",
    "bucket",
    "assign",
    "plan",
    "routing",
    "routing.routed",
    "routing.views",
    "p2p.assignment",
    "p2p.nics",
    "p2p.rate",
    "simulate",
    "cost",
    "contract",
    "hookspecs",
    "plugins",
    "wire",
    "store",
    "version_pool",
)
FOREIGN = ("ckpt_conformance", "ckpt_sglang", "ckpt_trtllm", "ckpt_vllm", "sglang", "tensorrt_llm", "vllm")
ENVIRONMENT_READS = ("environ", "environb", "getenv", "getenvb")


def layer_of(path: Path) -> str:
    """Name of the layer a source file belongs to; `__init__` for the public face of the whole package."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(CORE.rglob("*.py"))


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs, that is, without the bodies of `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from runtime_nodes(other)
        else:
            yield from runtime_nodes(child)


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module imports when it runs; `from a import b` gives `a.b`.

    `package` is the package the module lies in, which relative imports start from.
    """
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{parent}.{base}".rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def dynamic_imports(tree: ast.AST) -> Iterator[str]:
    """Names written out as the first argument of `import_module` or `__import__`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def imports_of(path: Path) -> list[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imported_names(ast.parse(path.read_text()), package))


def core_layer(name: str) -> str | None:
    """Layer of ckpt_core that an imported name belongs to; None for other packages."""
    parts = name.split(".")
    if parts[0] != "ckpt_core":
        return None
    modules = {*LAYERS, *(layer_of(path) for path in sources())}
    return parts[1] if len(parts) > 1 and parts[1] in modules else "__init__"


def allowed(layer: str) -> set[str]:
    """Layers that modules of `layer` may import: the foundation, their own and those on the left."""
    if layer in FACE:
        return {*LAYERS, *FACE}
    if layer in FOUNDATION:
        return set(FOUNDATION)
    return {*FOUNDATION, *LINE[: LINE.index(layer) + 1]}


def violations(layer: str, names: list[str]) -> list[str]:
    """Imports among `names` that a module of `layer` must not have."""
    reached = [(name, core_layer(name)) for name in names]
    return [name for name, target in reached if target is not None and target not in allowed(layer)]


def test_every_module_has_its_place_in_the_line() -> None:
    unplaced = {layer_of(path) for path in sources()} - {*LAYERS, *FACE}
    assert not unplaced, f"put these modules into LINE, where their imports allow it: {sorted(unplaced)}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(CORE).as_posix())
def test_a_module_imports_only_from_its_left(path: Path) -> None:
    layer = layer_of(path)
    if layer not in {*LAYERS, *FACE}:
        pytest.skip("has no place; the test above fails for it")
    wrong = violations(layer, imports_of(path))
    assert not wrong, f"{path.relative_to(ROOT)} imports from its right: {wrong}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(CORE).as_posix())
def test_the_core_knows_no_engine_and_no_suite(path: Path) -> None:
    names = [*imports_of(path), *dynamic_imports(ast.parse(path.read_text()))]
    wrong = [name for name in names if name.split(".")[0] in FOREIGN]
    assert not wrong, (
        f"{path.relative_to(ROOT)} imports {wrong}; the core reaches engines through entry points and hooks"
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(CORE).as_posix())
def test_only_config_reads_the_environment(path: Path) -> None:
    if layer_of(path) == "config":
        pytest.skip("the one place for it")
    tree = ast.parse(path.read_text())
    reads = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ENVIRONMENT_READS]
    reads += [name for name in imports_of(path) if name in {f"os.{read}" for read in ENVIRONMENT_READS}]
    assert not reads, f"{path.relative_to(ROOT)} uses {reads}; read the environment in config.py"


@pytest.mark.parametrize("module", TORCHLESS)
def test_planning_imports_no_torch(module: str) -> None:
    name = f"ckpt_core.{module}"
    if importlib.util.find_spec(name) is None:
        pytest.skip("not written yet")
    program = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"importing {name} imports torch, or fails: {done.stderr}"


# -- the rules above, on made-up modules ------------------------------------------------------------------
def names_in(source: str, package: str = "ckpt_core") -> list[str]:
    return list(imported_names(ast.parse(source), package))


@pytest.mark.parametrize(
    ("layer", "source", "wrong"),
    [
        ("layout", "from ckpt_core.plan import Plan", ["ckpt_core.plan.Plan"]),
        ("layout", "from ckpt_core import plan", ["ckpt_core.plan"]),
        ("layout", "from . import plan", ["ckpt_core.plan"]),
        ("layout", "from .plan import Plan", ["ckpt_core.plan.Plan"]),
        ("layout", "def late():\n    import ckpt_core.plan", ["ckpt_core.plan"]),
        ("layout", "from ckpt_core import update", ["ckpt_core.update"]),
        ("errors", "import ckpt_core.dtypes", ["ckpt_core.dtypes"]),
        ("plan", "from ckpt_core.layout import Box", []),
        ("layout", "from ckpt_core.errors import PlanError", []),
        ("layout", "if TYPE_CHECKING:\n    from ckpt_core.plan import Plan", []),
        ("layout", "if not TYPE_CHECKING:\n    import ckpt_core.plan", ["ckpt_core.plan"]),
        ("layout", "if TYPE_CHECKING:\n    pass\nelse:\n    import ckpt_core.plan", ["ckpt_core.plan"]),
    ],
)
def test_the_rule_finds_what_it_should(layer: str, source: str, wrong: list[str]) -> None:
    assert violations(layer, names_in(source)) == wrong


def test_relative_imports_are_resolved_from_their_package() -> None:
    assert names_in("from ..plan import Step", "ckpt_core.transport") == ["ckpt_core.plan.Step"]
    assert names_in("from .base import Ring", "ckpt_core.transport") == ["ckpt_core.transport.base.Ring"]


def test_dynamic_imports_are_found() -> None:
    source = "importlib.import_module('vllm.version')\nimport_module(name)\nmetadata.version('vllm')"
    assert list(dynamic_imports(ast.parse(source))) == ["vllm.version"]
