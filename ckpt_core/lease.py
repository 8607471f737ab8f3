"""An owner's place in the directory: its lease is renewed while it lives, and what the directory forgot is offered again."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import suppress
from types import TracebackType

from ckpt_core.directory_client import DirectoryClient
from ckpt_core.errors import CkptError, EngineStateError, EngineUnavailable
from ckpt_core.membership import OwnerEntry
from ckpt_core.p2p.offers import Offer

_log = logging.getLogger(__name__)


class Lease:
    """A context manager: registers, renews three times a lease, leaves. A directory that is away for a while is waited for.

    Args:
        name, address: see OwnerEntry.

    Raises:
        EngineError: the directory refuses this owner at the start, or does not answer.

    Attributes:
        replaced: a later life of this owner is registered; this one is not renewed any more.
    """

    def __init__(self, directory: DirectoryClient, *, name: str, address: str, lease_s: float) -> None:
        self._directory = directory
        self._entry = OwnerEntry(
            instance=secrets.token_hex(16), name=name, address=address, born_at=time.time(), lease_s=lease_s
        )
        self._offers: dict[str, Offer] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.replaced = False

    def __enter__(self) -> Lease:
        self._directory.register(self._entry)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(CkptError):  # else the lease runs out
            self._directory.leave(self._entry.instance)

    def offer(self, offer: Offer) -> None:
        """Offer a version from now on; where the directory is away, as soon as it is back.

        Raises:
            EngineError: the directory refuses it.
        """
        with self._lock:
            self._offers[offer.digest] = offer
        try:
            self._directory.register(self._entry)
            self._directory.offer(self._entry.instance, offer)
        except EngineUnavailable as error:
            _log.warning("%s is offered when the directory is back: %s", offer.version, error)

    def withdraw(self, digest: str) -> None:
        """Not any more."""
        with self._lock:
            self._offers.pop(digest, None)
        self._renew()

    def _keep(self) -> None:
        while not self._ended.wait(self._entry.lease_s / 3) and not self.replaced:
            self._renew()

    def _renew(self) -> None:
        try:
            known = set(self._directory.register(self._entry).offers)
            with self._lock:
                mine = dict(self._offers)
            for digest in mine.keys() - known:
                self._directory.offer(self._entry.instance, mine[digest])
            for digest in known - mine.keys():
                self._directory.withdraw(self._entry.instance, digest)
        except EngineStateError as error:
            self.replaced = True
            _log.error("%s", error)
        except CkptError as error:
            _log.warning("the lease was not renewed: %s", error)
