"""Tables and JSON of `published_table.py`."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_update
import torch
from published_budget import Selection
from published_cases import Row, Way
from published_schedule import PUBLISHED
from rich.table import Table

_BUS_GB_S = 55.0  # into one GPU by PCIe 5 x16, as measured on two H200s with both busy
_GPUS = 8
_UNDERLINES = re.compile(r"\x1b\[[0-9;]*m")
COLUMNS = (
    "way",
    "GPUs",
    "first s",
    "median s",
    "min",
    "max",
    "pause s",
    "into each GPU GB",
    "GB/s",
    "% limit",
    "GPU MiB",
    "register s",
    "gather s",
    "wrong",
)


def expected_s(size_bytes: int) -> float:
    """Computed, not measured: a whole model over the buses of 8 GPUs, each byte once."""
    return size_bytes / 1e9 / (_GPUS * _BUS_GB_S)


def percent(row: Row) -> float:
    """Of the time that the buses alone would need for each byte once."""
    return 100 * row.size_gb / statistics.median(row.seconds) / row.limit_gb_s


def table_of(selection: Selection, rows: list[Row]) -> Table:
    """A model's measurements; published and computed figures are below them, apart."""
    limits = sorted({row.limit_gb_s for row in rows if row.gpus == max(row.gpus for row in rows)})
    title = f"{selection.name}; limit " + " to ".join(f"{limit:.1f}" for limit in limits[:: max(1, len(limits) - 1)])
    table = Table(title=f"{title} GB/s into all GPUs at once", caption=_caption(selection), caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    median = statistics.median(row.seconds)
    return [
        row.way,
        str(row.gpus),
        f"{row.first_s:.3f}",
        f"{median:.4f}",
        f"{min(row.seconds):.4f}",
        f"{max(row.seconds):.4f}",
        f"{statistics.median(row.pause_s):.3f}",
        f"{row.into_gpu_gb:.2f}",
        f"{row.into_gpu_gb / median:.1f}",
        f"{percent(row):.1f}",
        f"{row.gpu_mib:.0f}",
        f"{row.register_s:.2f}",
        "" if row.gather_s is None else f"{row.gather_s:.2f}",
        str(row.wrong),
    ]


def _caption(selection: Selection) -> str:
    lines = [
        f"published for the whole model on {row.gpus} x {row.device}: {row.broadcast_s} s broadcast, {row.p2p_s} s P2P"
        for row in PUBLISHED
        if row.model == selection.model
    ]
    computed = expected_s(selection.whole_bytes)
    lines.append(
        f"computed: at {_BUS_GB_S:.0f} GB/s a GPU, whole model on {_GPUS} GPUs, each byte once: {computed:.2f} s"
    )
    return "\n".join(lines)


def machine(world: int, device: str) -> dict[str, str]:
    """What ran it."""
    about = {
        **gpu_update.host(),
        "memory GB": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}",
        "nodes of memory": str(len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
    }
    if device != "cuda":
        return {"ranks": f"{world} on CPU", **about}
    return {
        **gpu_update.machine(world),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        **about,
        "links": _UNDERLINES.sub("", _said_by("nvidia-smi", "topo", "-m")),
    }


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def write(path: Path, about: dict[str, str], rows: list[Row], failures: list[dict[str, Any]]) -> None:
    """All figures, as JSON; percentages and computed seconds are named so."""
    data = {
        "machine": about,
        "rows": [{**asdict(row), "percent_of_limit": percent(row)} for row in rows],
        "failures": failures,
        "published_8xH800_s": {
            row.model: {"broadcast": row.broadcast_s, "p2p": row.p2p_s} for row in PUBLISHED if row.device == "H800"
        },
        "computed_whole_model_on_8_at_55_gb_s_each_s": {
            row.selection.model: expected_s(row.selection.whole_bytes) for row in rows if row.way != Way.PEER.value
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
