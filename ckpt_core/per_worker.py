"""What is remembered of an engine's worker objects, without keeping them alive."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class PerWorker(Generic[Value]):
    """One value per worker object, by identity; gone with the worker."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[Any] | None, Value]] = {}

    def put(self, worker: Any, value: Value, *, for_good: bool = False) -> None:
        """Remember it. Of a worker without weak references nothing is, unless it must be `for_good`."""
        key = id(worker)
        try:
            reference = weakref.ref(worker, lambda _gone: self._by_id.pop(key, None))
        except TypeError:
            if not for_good:
                return
            reference = None
        self._by_id[key] = (reference, value)

    def get(self, worker: Any) -> Value | None:
        """What was remembered; None where nothing was."""
        reference, value = self._by_id.get(id(worker), (None, None))
        return value if reference is None or reference() is worker else None

    def pop(self, worker: Any) -> Value | None:
        """Forget it, and return it."""
        value = self.get(worker)
        self._by_id.pop(id(worker), None)
        return value
