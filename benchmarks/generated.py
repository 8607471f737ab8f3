"""Checkpoints of real shapes with values that can be computed again anywhere: no two neighbours alike, no two tensors alike."""

from __future__ import annotations

import json
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from shapes import Shape

from ckpt_core.dtypes import DType

if TYPE_CHECKING:
    import torch

_PERIOD = 65521  # a prime: rows do not repeat in step with any power of two
_BUFFERS = 1024  # that one call may write
_WRITERS = 8  # memory files grow as they are touched, page by page: one thread brings 3 GB/s


def expected_values(
    name: str, shape: tuple[int, ...], seed: int, device: torch.device, dtype: DType = DType.BF16
) -> torch.Tensor:
    """The values of a tensor, on a device."""
    import torch

    size_bytes = math.prod(shape) * dtype.itemsize
    bits = torch.from_numpy(_pattern(name, seed, dtype)).to(device)
    repeated = bits.repeat(-(-size_bytes // bits.nbytes)).view(torch.uint8)[:size_bytes]
    return repeated.view(getattr(torch, dtype.torch_name)).view(shape)


def write_checkpoint(path: Path, shapes: list[Shape], seed: int) -> None:
    """One safetensors file, in the order of the shapes."""
    header: dict[str, object] = {}
    offsets = [0]
    for shape in shapes:
        span = [offsets[-1], offsets[-1] + shape.size_bytes]
        header[shape.name] = {"dtype": shape.dtype.value, "shape": list(shape.shape), "data_offsets": span}
        offsets.append(span[1])
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % 4096)  # data begins on a page
    with path.open("wb") as file, ThreadPoolExecutor(_WRITERS) as writers:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.flush()

        def write(shape: Shape, offset: int) -> None:
            pattern = _pattern(shape.name, seed, shape.dtype)
            _write_values(file.fileno(), len(raw) + 8 + offset, pattern.tobytes(), shape.size_bytes)

        for _ in writers.map(write, shapes, offsets[:-1]):
            pass


def _pattern(name: str, seed: int, dtype: DType) -> np.ndarray:
    """One period of 16-bit values: as BF16 of either sign and between 2**-9 and 2**-5, so that a model can compute with them.

    Two of them are a float32 of that size; as FP8 they are below 2, and never NaN.
    """
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    values = generator.integers(0, 1 << 16, _PERIOD, dtype=np.uint16)
    if dtype.itemsize == 1:
        return (values & 0xBFBF).astype(np.uint16).view(np.int16)
    exponents = ((values >> 7) & 3) + (127 - 9)
    return ((values & 0x807F) | (exponents << 7)).astype(np.uint16).view(np.int16)


def _write_values(file: int, offset: int, pattern: bytes, size_bytes: int) -> None:
    """The pattern over and over, from an offset of an open file on."""
    while size_bytes > 0:
        whole, rest = divmod(min(size_bytes, _BUFFERS // 2 * len(pattern)), len(pattern))
        written = os.pwritev(file, [*[pattern] * whole, pattern[:rest]], offset)
        assert written == whole * len(pattern) + rest, "no room"
        offset, size_bytes = offset + written, size_bytes - written
