"""Python runs this at the start of every process under test. It does nothing where no control directory is named."""

from __future__ import annotations

import os

if os.environ.get("CKPT_FAULTS"):
    import ckpt_faults

    ckpt_faults.install()
