"""How much of a large model fits: the largest whole number of its layers, and what sets that bound."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from shapes import LARGE, MODELS

_SLACK = 1.1  # page tables, rings, pinned slots, processes
_SPARE_BYTES = 4_000_000_000
_GPU_SHARE = 0.75  # the rest is for rings, contexts, and what the check of values needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The first layers of a model. Sizes in bytes of the checkpoint.

    Attributes:
        why: what bounds the number of layers; "" where all are taken.
    """

    model: str
    layers: int
    of_layers: int
    size_bytes: int
    whole_bytes: int
    why: str

    @property
    def name(self) -> str:
        """For tables."""
        size = f"{self.size_bytes / 1e9:.1f} of {self.whole_bytes / 1e9:.1f} GB"
        return f"{self.model}, {self.layers} of {self.of_layers} layers, {size}" + f" ({self.why})" * bool(self.why)


def bounds(directory: Path, *, gpu_bytes: int, gpus: int, copies: int) -> dict[str, int]:
    """Bytes that a checkpoint may have, by what sets the bound.

    Args:
        gpu_bytes: memory of one GPU; 0 without.
        gpus: that share the weights, in the way that has fewest.
        copies: of the checkpoint in host memory at once.
    """
    found = {
        "host memory": int((_free_host_bytes() - _SPARE_BYTES) / copies / _SLACK),
        str(directory): int(shutil.disk_usage(directory).free / 1.02),
    }
    if gpu_bytes:
        found["GPU memory"] = int(gpu_bytes * gpus * _GPU_SHARE)
    return found


def select(model: str, bounded: dict[str, int], layers: int | None = None) -> Selection:
    """The largest whole number of layers within all bounds, or the number asked for.

    Raises:
        SystemExit: not even one layer fits.
    """
    sizes = _sizes(model)
    why, most = min(bounded.items(), key=lambda item: item[1])
    fitting = [count for count, size in enumerate(sizes) if count and size <= most]
    if not fitting:
        raise SystemExit(f"one layer of {model} is {sizes[1] / 1e9:.1f} GB; {why} allows {most / 1e9:.1f}")
    taken = fitting[-1] if layers is None else layers
    if taken not in fitting:
        raise SystemExit(f"{layers} layers of {model} asked for; {why} allows {fitting[-1]}")
    said = f"bounded by {why}" if layers is None else "as asked"
    return Selection(
        model=model,
        layers=taken,
        of_layers=len(sizes) - 1,
        size_bytes=sizes[taken],
        whole_bytes=sizes[-1],
        why="" if taken == len(sizes) - 1 else said,
    )


def _sizes(model: str) -> list[int]:
    """Bytes of a checkpoint of the first so many layers, from none to all."""
    by_layer: dict[int, int] = defaultdict(int)
    for shape in MODELS[model](LARGE[model].all_layers):
        parts = shape.name.split(".")
        by_layer[int(parts[2]) if parts[1] == "layers" else -1] += shape.size_bytes
    sizes = [by_layer[-1]]
    for layer in range(LARGE[model].all_layers):
        sizes.append(sizes[-1] + by_layer[layer])
    return sizes


def _free_host_bytes() -> int:
    """What the kernel, and this container's group where there is one, still give."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        most, used = ((group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(used))
