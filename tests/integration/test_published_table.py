"""The benchmark of large models' shapes runs where there is no GPU, and its check of values sees what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_core.config import child_environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(240)

LOOK = """
import sys
from pathlib import Path
from generated import write_checkpoint
from safetensors.torch import load_file
from mock_engine import MockEngine
from mock_worker import MockOptions, MockWorker
from shapes import LARGE, MODELS

if __name__ == "__main__":
    shapes = MODELS["tiny-fp8"](LARGE["tiny-fp8"].all_layers)
    path = Path(sys.argv[1])
    write_checkpoint(path, shapes, 1)
    tensors = load_file(path)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float8_e4m3fn", "torch.float32", "torch.bfloat16"}
    assert all(tensor.float().isfinite().all() for tensor in tensors.values())
    options = MockOptions(model="tiny-fp8", layers=3, world=2, device="cpu")
    for rank in range(2):
        worker = MockWorker(options, rank)
        elements = sum(box.size for box in worker.boxes.values())
        worker.poison()
        assert worker.wrong_bytes(1) == elements
        worker.load_whole(tensors.items())
        assert worker.wrong_bytes(1) == 0
        assert worker.wrong_bytes(2) > 0.9 * elements
"""


def test_three_ways_on_cpu(tmp_path):
    out = tmp_path / "results.json"
    command = [BENCHMARKS / "published_table.py", f"--out={out}", "--device=cpu", "--world=2", "--model=tiny-fp8"]
    options = ["--skip-peer", "--budget-gb=0.2", "--repeats=1", "--p2p-repeats=1", f"--directory={tmp_path}"]
    subprocess.run([sys.executable, *command, *options], env=child_environment(), check=True)
    found = json.loads(out.read_bytes())
    assert found["failures"] == []
    assert [(row["way"], row["gpus"]) for row in found["rows"]] == [("everywhere", 2), ("routed", 2), ("p2p", 1)]
    assert all(row["wrong"] == 0 and len(row["seconds"]) == 1 for row in found["rows"])
    everywhere, routed, joined = found["rows"]
    assert everywhere["into_gpu_gb"] == everywhere["size_gb"] == joined["into_gpu_gb"]
    assert routed["into_gpu_gb"] < 0.75 * routed["size_gb"]  # what is not split, every rank has
    assert sum(agent["network_in_bytes"] for agent in joined["details"]["last"]["agents"]) >= joined["size_gb"] * 1e9
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_values_are_checked(tmp_path):
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    environment = {**child_environment(), "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"}
    subprocess.run([sys.executable, script, tmp_path / "m.safetensors"], env=environment, check=True)
