"""Checkpoints of real shapes with values that can be computed again anywhere: no two neighbours alike, no two tensors alike."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from shapes import Shape

if TYPE_CHECKING:
    import torch

_PERIOD = 65521  # a prime: rows do not repeat in step with any power of two


def expected_values(name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """The BF16 values of a tensor, on a device."""
    import torch

    count = int(np.prod(shape))
    bits = torch.from_numpy(_pattern(name, seed)).to(device)
    repeated = bits.repeat(-(-count // _PERIOD))[:count]
    return repeated.view(torch.bfloat16).view(shape)


def write_checkpoint(path: Path, shapes: list[Shape], seed: int) -> None:
    """One safetensors file, written straight through, in the order of the shapes."""
    import json

    header: dict[str, object] = {}
    offset = 0
    for shape in shapes:
        end = offset + shape.size_bytes
        header[shape.name] = {"dtype": "BF16", "shape": list(shape.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % 4096)  # data begins on a page
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shapes:
            _write_values(file, _pattern(shape.name, seed), shape.size_bytes)


def _pattern(name: str, seed: int) -> np.ndarray:
    """One period of 16-bit values: as BF16 of either sign and between 2**-9 and 2**-5, so that a model can compute with them."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    values = generator.integers(0, 1 << 16, _PERIOD, dtype=np.uint16)
    exponents = ((values >> 7) & 3) + (127 - 9)
    return ((values & 0x807F) | (exponents << 7)).astype(np.uint16).view(np.int16)


def _write_values(file: object, pattern: np.ndarray, size_bytes: int) -> None:
    block = np.tile(pattern, 64).tobytes()
    while size_bytes > 0:
        file.write(block[:size_bytes])  # type: ignore[attr-defined]
        size_bytes -= len(block)
