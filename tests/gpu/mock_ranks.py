"""Two ranks of the benchmarks' stand-in engine, and what updates them."""

from __future__ import annotations

from uuid import uuid4

import ckpt_core
from ckpt_core.config import UpdateConfig

MODEL, LAYERS = "qwen3-30b-a3b", 1


def engine(*, cut: bool = True, one_visible: bool = True, record: bool = False):
    from mock_engine import MockEngine, gpu_uuid
    from mock_worker import MockOptions

    options = MockOptions(
        model=MODEL,
        layers=LAYERS,
        world=2,
        device="cuda",
        cut=cut,
        one_visible=one_visible,
        record=record,
        instance=uuid4().hex,
    )
    return MockEngine(options, [gpu_uuid(index) for index in range(2)])


def updater(handle, config: UpdateConfig | None = None, on_progress=None) -> ckpt_core.Updater:
    from mock_engine import plugin

    target = ckpt_core.Target(engine="mock", url="mock", handle=handle, plugin=plugin())
    return ckpt_core.Updater([target], config=config or UpdateConfig(fingerprint=False), on_progress=on_progress)
