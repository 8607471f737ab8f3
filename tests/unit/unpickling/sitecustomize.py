"""Python runs this at the start of every process that has it on its path: whatever unpickles there is noted, and fails.

Not noted is importlib, which reads compiled modules with `marshal.loads`.
"""

import os
import pickle
import sys
import traceback
from pathlib import Path

NOTES = Path(os.environ["UNPICKLING_NOTES"])


def note(kind, text):
    """One file for each process: several of them write at the same time."""
    with (NOTES / f"{os.getpid()}.{kind}").open("a") as file:
        file.write(text + "\n")


def refuse(what):
    """Say who it was, and raise."""
    note("attempts", f"{what}\n{''.join(traceback.format_stack()[:-2])}")
    raise RuntimeError(f"{what} in a test that nothing unpickles in")


def refusing(what):
    """A function in the place of the one that is not to be called."""
    return lambda *_arguments, **_options: refuse(what)


class Unpickler(pickle.Unpickler):
    """Can be inherited from, as libraries do when they are imported; cannot be made."""

    def __init__(self, *_arguments, **_options):
        refuse("pickle.Unpickler")


def guard_marshal(event, _arguments):
    """The audit hook: marshal has no class to replace, and importlib must go on."""
    if event not in ("marshal.loads", "marshal.load"):
        return
    frame = sys._getframe(1)
    if frame is not None and not frame.f_code.co_filename.startswith(("<frozen importlib", "<frozen zipimport")):
        refuse(event)


def guard_torch():
    """torch.load, where torch is loaded at all: called by the test, since importing it here would slow all processes."""
    import torch

    torch.load = refusing("torch.load")


pickle.loads = refusing("pickle.loads")
pickle.load = refusing("pickle.load")
pickle.Unpickler = Unpickler
pickle._Unpickler.load = refusing("pickle._Unpickler.load")
sys.addaudithook(guard_marshal)
note("guarded", " ".join(getattr(sys, "orig_argv", sys.argv)))
