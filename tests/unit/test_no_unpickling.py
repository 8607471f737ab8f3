"""A whole update while pickle, marshal and torch.load refuse to work: nobody in it tries.

The controller and the receiving side (a reference worker) run in one process, agents are real children of it. What torch and
multiprocessing do in rank processes that an engine starts by itself is the engine's own affair, and not looked at here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "unpickling"
# of this project: their attempts would be ours
OURS = ("/ckpt_core/", "/ckpt_conformance/", "/ckpt_vllm/", "/ckpt_sglang/", "/ckpt_trtllm/")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the script printed, and the notes of all processes by kind and process id."""
    folder, notes = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("notes")
    path = [str(HERE), str(ROOT), str(ROOT / "conformance"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir="/dev/shm") as memory:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "UNPICKLING_NOTES": str(notes),
            "CKPT_SHM_DIR": memory,
            "CKPT_SOCKET_DIR": memory,
        }
        done = subprocess.run(
            [sys.executable, HERE / "whole_update.py", folder],
            env=environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {
        kind: {int(file.stem): file.read_text() for file in notes.glob(f"*.{kind}")} for kind in ("guarded", "attempts")
    }
    return json.loads(done.stdout.splitlines()[-1]), found


def test_both_updates_were_whole(ran):
    told, _ = ran
    assert told["versions"] == ["b", "a"]
    assert len(set(told["agents"])) == 1


def test_all_processes_were_guarded_and_the_guard_works(ran):
    told, notes = ran
    assert {told["pid"], *told["agents"]} <= notes["guarded"].keys()
    assert all("ckpt_core.agent" in notes["guarded"][pid] for pid in told["agents"])
    assert told["noticed"] == ["pickle.loads", "pickle.Unpickler", "torch.load", "marshal.loads"]


def test_nobody_tried(ran):
    told, notes = ran
    attempts = notes["attempts"]
    assert not attempts.keys() & set(told["agents"])
    of_the_script = attempts.pop(told["pid"])
    assert attempts == {}
    assert not any(place in of_the_script for place in OURS), of_the_script
    assert [line for line in of_the_script.splitlines() if line in told["noticed"]] == told["noticed"]
