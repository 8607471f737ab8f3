"""Shared libraries that Python packages need and that only the system can give."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

INSTALL_TIMEOUT_S = 300


def require(library: str, *, package: str, why: str) -> None:
    """See that a library can be loaded; where it is missing install its Debian package as root, else say which one it is."""
    if _loads(library):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        sys.stderr.write(f"installing {package} with apt-get: {why} need {library}\n")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-qq"], ["install", "-y", "-qq", package]):
            subprocess.run(["apt-get", *arguments], check=True, timeout=INSTALL_TIMEOUT_S, env=quiet, stdout=sys.stderr)
    if not _loads(library):
        sys.exit(
            f"{why} need {library}, which this machine lacks; on Debian and Ubuntu: sudo apt-get install {package}"
        )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
