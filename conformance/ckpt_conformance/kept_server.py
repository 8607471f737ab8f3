"""A server that checks use one after the other: starting one may take a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ckpt_conformance.harness import Server


class KeptServer:
    """Started for the first check that needs it, ended by a check that fails with it, or with the run."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._server: Server | None = None

    @contextmanager
    def lend(self, start: Callable[[], AbstractContextManager[Server]]) -> Iterator[Server]:
        """The server, on whatever weights the last check left."""
        if self._server is None:
            self._server = self._running.enter_context(start())
        try:
            yield self._server
        except BaseException:
            self.close()  # the next check gets a sound one
            raise

    def close(self) -> None:
        """End it, if it runs."""
        self._server = None
        self._running.close()
