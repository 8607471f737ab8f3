"""Steps that an interrupt must not cut short: without them nobody knows what engines hold."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

_log = logging.getLogger(__name__)
_INTERRUPTS = 3
Value = TypeVar("Value")


def insist(call: Callable[[], Value]) -> Value:
    """Do it again when it is interrupted, a few times. Whoever interrupts the way back gets it faster by waiting."""
    for _ in range(_INTERRUPTS):
        try:
            return call()
        except KeyboardInterrupt:
            _log.warning("interrupted while an update is brought to its end; going on")
    return call()
