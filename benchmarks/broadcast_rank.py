"""One rank of a broadcast of everything: each rank gets every byte of a checkpoint, as checkpoint-engine's broadcast does.

Started by several_hosts.py on each host, once per rank: a gloo group of all ranks, buckets that each rank broadcasts in turn.
Prints the seconds of each round as JSON. Nothing is done with the bytes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ckpt_conformance.reference.nodes import interface_of


def main() -> None:
    """Arguments: JSON with rank, size, address, master, port, bytes, bucket_bytes, rounds."""
    options = json.loads(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(options["address"])
    torch.set_num_threads(1)
    store = dist.TCPStore(
        options["master"], options["port"], is_master=options["rank"] == 0, timeout=timedelta(seconds=60)
    )
    rank, size = options["rank"], options["size"]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    bucket = torch.full((options["bucket_bytes"],), rank, dtype=torch.uint8)
    buckets = -(-options["bytes"] // options["bucket_bytes"])
    seconds = []
    for _ in range(options["rounds"]):
        dist.barrier()
        start = time.perf_counter()
        for number in range(buckets):
            dist.broadcast(bucket, number % size)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
