"""The reference's plugin, but with the engine imported at the top."""

from ckpt_conformance.reference import worker  # noqa: F401 the bug
from ckpt_conformance.reference.plugin import *  # noqa: F403 all hooks are what they are
