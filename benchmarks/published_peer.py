"""Runs checkpoint-engine's benchmark of `peer_checkpoint_engine.py` under torchrun, with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from published_cases import SEED, Row, Setting, Way

_SCRIPT = Path(__file__).with_name("peer_checkpoint_engine.py")
_GRACE_S = 30.0


def run_peer(setting: Setting, packages: Path | None, timeout_s: float) -> Row:
    """One row: seconds are those of the slowest parameter server, update by update.

    Args:
        packages: folder with the peer's packages; None where they are installed.

    Raises:
        RuntimeError: it failed, or took too long; with the end of what it said.
    """
    selection = setting.selection
    job = {"checkpoint": str(setting.checkpoint), "model": selection.model, "layers": selection.layers}
    job |= {"repeats": setting.repeats, "seed": SEED}
    results = setting.scratch / "peer"
    results.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={setting.world}"]
    _run([*torchrun, str(_SCRIPT), json.dumps(job)], _environment(packages, results), results / "log", timeout_s)
    return _row(setting, [json.loads((results / f"{rank}.json").read_text()) for rank in range(setting.world)])


def _environment(packages: Path | None, results: Path) -> dict[str, str]:
    """This folder, this project, the peer's packages, and whatever is there."""
    here = Path(__file__).parent
    paths = [here, here.parent, *([packages] if packages else []), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": ":".join(str(path) for path in paths if path), "PEER_RESULTS": str(results)}


def _run(command: list[str], environment: dict[str, str], log: Path, timeout_s: float) -> None:
    with log.open("wb") as output:  # a pipe would be held open by what torchrun leaves behind
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"no end within {timeout_s:.0f} s"
        finally:
            _end(process)
    if code:
        said = log.read_text(errors="replace")
        first = said.find("Error")
        raise RuntimeError(f"its benchmark: {code}\n{said[max(0, first - 2000) :][:4000]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its processes when it is told to; these end theirs, which look for them."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _row(setting: Setting, servers: list[dict[str, Any]]) -> Row:
    size_gb = setting.selection.size_bytes / 1e9
    first, *seconds = [max(times) for times in zip(*(server["update"] for server in servers), strict=True)]
    return Row(
        way=Way.PEER.value,
        selection=setting.selection,
        gpus=setting.world,
        size_gb=size_gb,
        into_gpu_gb=size_gb,
        first_s=first,
        seconds=seconds,
        pause_s=list(seconds),
        call_s=list(seconds),
        register_s=max(server["register"] for server in servers),
        gather_s=max(server["gather_metas"] for server in servers),
        gpu_mib=max(server["gpu_mib"] for server in servers),
        wrong=sum(server["wrong"] for server in servers),
        note="its broadcast; the update is the pause; buckets as it chooses them",
        details={"servers": servers},
    )
