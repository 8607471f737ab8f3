"""A real vLLM whose memory was given back: weights first, then an update, then the cache."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import ckpt_core
from ckpt_core.config import UpdateConfig
from ckpt_core.errors import EngineStateError
from ckpt_core.metrics import UpdateReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
]

MODEL, LAYERS = "qwen3-32b", 1
PROMPT = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from generated import write_checkpoint
    from vllm_shapes import shapes_of

    path = tmp_path_factory.mktemp("checkpoint") / "v1.safetensors"
    write_checkpoint(path, shapes_of(MODEL, LAYERS), 1)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from vllm_shapes import write_model

    from ckpt_vllm.launch import NATIVE, VllmServer

    model = tmp_path_factory.mktemp("model")
    write_model(model, MODEL, LAYERS)
    options = ("--enable-sleep-mode", "--gpu-memory-utilization", "0.4", "--dtype", "bfloat16")
    road = (*NATIVE, "--worker-extension-cls", "vllm_extension.BenchExtension")
    with VllmServer(model, load_format="dummy", road=road, extra=options, max_model_len=512) as running:
        yield running


def update(server, checkpoint: Path) -> UpdateReport:
    config = UpdateConfig(digest_content=False, fingerprint=False)
    with ckpt_core.Updater([ckpt_core.Target(engine="vllm", url=server.url)], config=config) as updater:
        return updater.update(checkpoint, version="v1")


@pytest.mark.parametrize("level", [1, 2])
def test_weights_wake_then_an_update_then_the_cache(server, checkpoint: Path, level: int) -> None:
    update(server, checkpoint)
    awake = server.generate(PROMPT, 8)
    assert server.post("/sleep", level=str(level)).is_success
    with pytest.raises(EngineStateError, match="asleep"):
        update(server, checkpoint)
    assert server.post("/wake_up", tags="weights").is_success
    server.rpc("ckpt_spoil")
    update(server, checkpoint)
    assert server.rpc("ckpt_wrong", model=MODEL, layers=LAYERS, seed=1) == [{"wrong": 0}]
    assert server.client.get("/is_paused").json()["is_paused"]  # there is no cache to serve with yet
    assert server.post("/wake_up", tags="kv_cache").is_success
    assert server.generate(PROMPT, 8) == awake
