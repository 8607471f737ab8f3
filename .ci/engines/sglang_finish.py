"""Make SGLang importable on a CPU: `sglang_finish.py`, run by the environment's own Python after the packages.

Two things that SGLang imports exist for GPUs only, and stand-ins take their place:

* `sgl_kernel`, its compiled kernels: see the package beside this file. SGLang then takes the paths in plain PyTorch.
* the compiled operators of torchvision: PyPI's build wants CUDA libraries. Two operators are declared without a body, which is
  all that importing torchvision asks for.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

KERNEL = "sgl_kernel"
DECLARATIONS = """\
import torch as _torch
import torchvision.extension as _extension

if not _extension._has_ops():  # declared by a stand-in: without these lines the rest of this file cannot be imported
    _DECLARED = _torch.library.Library("torchvision", "FRAGMENT")
    _DECLARED.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""


def main() -> None:
    """Do both."""
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copytree(Path(__file__).parent / KERNEL, packages / KERNEL, dirs_exist_ok=True)
    operators = packages / "torchvision" / "_meta_registrations.py"
    text = operators.read_text()
    if not text.startswith(DECLARATIONS):
        operators.write_text(DECLARATIONS + text)


if __name__ == "__main__":
    main()
