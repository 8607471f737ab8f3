"""A stand-in for SGLang's compiled kernels, for machines without a GPU. It computes nothing.

Every name can be imported, and calling one fails loudly. Submodules do not exist: whoever imports one has a fallback.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+stand.in"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments: Any, **_options: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: only a stand-in of SGLang's kernels is installed")

    missing.__name__ = name
    return missing
