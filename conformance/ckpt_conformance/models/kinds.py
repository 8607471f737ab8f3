"""Arguments of `make_tiny` for each kind of model that checks need; for harnesses of engines that have no demands of their own."""

from __future__ import annotations

from typing import Any

from ckpt_conformance.levels import ModelKind

TINY_KINDS: dict[ModelKind, dict[str, Any]] = {
    ModelKind.PLAIN: {"arch": "llama"},
    ModelKind.TIED: {"arch": "qwen3", "tied": True},
    ModelKind.EXPERTS: {"arch": "qwen3_moe", "experts": 4, "layers": 1},
    ModelKind.QUANTISED: {"arch": "qwen3_moe", "experts": 4, "layers": 1},
    ModelKind.ODD_SIZES: {
        "arch": "qwen3",
        "vocab": 61,
        "hidden": 27,
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 6,
        "intermediate": 35,
        "dtype": "float32",
    },
    ModelKind.DRAFT: {"arch": "qwen3", "layers": 1, "draft": True},
    ModelKind.SCALARS: {"arch": "llama", "layers": 1, "scalars": True},
    ModelKind.SHARDED: {"arch": "llama"},
}
