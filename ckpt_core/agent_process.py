"""Starts and ends processes of agents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec

from ckpt_core.agent import AgentConfig
from ckpt_core.config import child_environment
from ckpt_core.device import CPU

_STOP_TIMEOUT_S = 5.0


def spawn(config: AgentConfig) -> subprocess.Popen[bytes]:
    """Start an agent. It ends when its standard input does."""
    child = subprocess.Popen(
        [sys.executable, "-m", "ckpt_core.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=child_environment(visible_gpu=None if config.device == CPU else config.device),
    )
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(config) + b"\n")
    child.stdin.flush()
    return child


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End agents: politely, then not."""
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    for child in children:
        try:
            child.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
