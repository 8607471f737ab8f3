"""The names that users import are frozen: a change here is a change for them and belongs in the changelog."""

import subprocess
import sys

import ckpt_core

PUBLIC = [
    "CkptError",
    "Cluster",
    "DirectoryClient",
    "EngineLook",
    "Joiner",
    "LookReport",
    "Manifest",
    "Outcome",
    "Owner",
    "PauseMode",
    "Peers",
    "Reading",
    "Target",
    "Undo",
    "UpdateAborted",
    "UpdateConfig",
    "UpdateReport",
    "Updater",
    "VerifyLevel",
    "open_checkpoint",
    "update",
]


def test_the_public_names_are_these():
    assert ckpt_core.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


def test_every_name_resolves_and_is_shown():
    for name in PUBLIC:
        assert getattr(ckpt_core, name).__doc__, name
        assert name in dir(ckpt_core)


def test_other_names_are_not_there():
    assert not hasattr(ckpt_core, "Session")


def test_star_import_gives_the_public_names_only():
    scope = {}
    exec("from ckpt_core import *", scope)  # noqa: S102
    assert sorted(scope.keys() - {"__builtins__"}) == PUBLIC


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, ckpt_core; print([m for m in ('torch', 'numpy', 'zmq', 'httpx', 'pluggy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
