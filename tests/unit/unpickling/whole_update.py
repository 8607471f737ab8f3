"""Two whole updates of a reference worker in this process, by agents that are its children; and that attempts are noticed."""

import json
import marshal
import os
import pickle
import sys
from pathlib import Path

import sitecustomize
import torch

from ckpt_conformance.models.tiny import make_tiny, perturb
from ckpt_conformance.reference.worker import Worker
from ckpt_core import Target, UpdateConfig, Updater


def main(folder: Path) -> None:
    """Prints what the updates were, for the test to look at."""
    torch.set_num_threads(1)
    sitecustomize.guard_torch()
    first = make_tiny(folder / "a", vocab=300)
    second = perturb(first, folder / "b", seed=2)
    worker = Worker(first)
    config = UpdateConfig(ring_bytes=1 << 16, bucket_bytes=1 << 14, attach_timeout_s=60.0)
    versions, agents = [], []
    with Updater([Target(engine="reference", url="worker", handle=worker)], config=config) as updater:
        for checkpoint in (second, first):
            updater.update(checkpoint, version=checkpoint.name)
            versions.append(worker.version)
            agents += updater.agent_pids
    noticed = []
    for attempt in (pickle.loads, pickle.Unpickler, torch.load, marshal.loads):
        try:
            attempt(b"N")
        except RuntimeError as error:
            noticed.append(str(error).split(" in ")[0])
    told = {"pid": os.getpid(), "versions": versions, "agents": agents, "noticed": noticed}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
