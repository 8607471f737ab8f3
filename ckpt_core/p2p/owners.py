"""Those whose memory is read: whom to ask next, who is gone, who gave wrong bytes.

Each has a few reads under way at a time, and the next one goes to whoever has the fewest bytes to deliver: who is faster, or serves
fewer others, gives more, without anybody knowing rates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ckpt_core.errors import PeerLost, TransportError
from ckpt_core.source import RemoteOwner
from ckpt_core.transport.p2p.base import OneSided, Pending, Read

_log = logging.getLogger(__name__)
_WINDOW_BYTES = 16 << 20


@dataclass(slots=True, kw_only=True)
class _Owner:
    """One of them; `peer` is its name in the library, `heard_at` the time of its last bytes."""

    remote: RemoteOwner
    peer: str = ""
    on_way_bytes: int = 0
    heard_at: float = 0.0
    got_bytes: int = 0
    lost: str = ""


class Owners:
    """Of one version.

    Args:
        library: open in this process; all owners are of it.
        first: which is asked first, among equals.

    Raises:
        PeerLost: none can be reached.
    """

    def __init__(self, library: OneSided, remotes: Sequence[RemoteOwner], *, first: int = 0) -> None:
        self._library = library
        start = first % len(remotes)
        self._owners = [_Owner(remote=remote) for remote in (*remotes[start:], *remotes[:start])]
        for owner in self._owners:
            try:
                owner.peer = library.connect(owner.remote.contact)
            except (PeerLost, TransportError) as error:
                self._lose(owner, error)

    @property
    def got_bytes(self) -> dict[str, int]:
        """What arrived, by owner."""
        return {owner.remote.name: owner.got_bytes for owner in self._owners}

    def __str__(self) -> str:
        return ", ".join(owner.remote.name for owner in self._owners if not owner.lost) or "nobody"

    def next(self, avoid: Collection[str], only: str = "") -> str | None:
        """Whom to ask; None where all have enough to do.

        Args:
            avoid: never these.
            only: this one, if it still lives.

        Raises:
            PeerLost: nobody is left, or all of them were to be avoided.
        """
        able = [owner for owner in self._owners if not owner.lost and owner.remote.name not in avoid]
        if not able:
            gone = "; ".join(f"{owner.remote.name}: {owner.lost or 'gave wrong bytes'}" for owner in self._owners)
            raise PeerLost(f"no owner is left to read from ({gone}); join from others")
        able = [owner for owner in able if owner.remote.name == only] or able
        best = min(able, key=lambda owner: owner.on_way_bytes)
        return best.remote.name if best.on_way_bytes < _WINDOW_BYTES else None

    def read(self, name: str, tensor: int, first_byte: int, local: int, size_bytes: int) -> Pending | None:
        """Begin to read a range of a tensor; None where the owner turns out to be gone."""
        owner = self._named(name)
        remote = owner.remote.addresses[tensor] + first_byte
        try:
            pending = self._library.read(owner.peer, [Read(local=local, remote=remote, size_bytes=size_bytes)])
        except PeerLost as error:
            self._lose(owner, error)
            return None
        owner.on_way_bytes += size_bytes
        return pending

    def ended(self, name: str, size_bytes: int, error: Exception | None) -> None:
        """A read came to its end, or will not."""
        owner = self._named(name)
        owner.on_way_bytes -= size_bytes
        if error is None:
            owner.got_bytes += size_bytes
            owner.heard_at = time.monotonic()
        else:
            self._lose(owner, error)

    def dropped(self, name: str, size_bytes: int) -> None:
        """A read is waited for no more, through no fault of its owner."""
        self._named(name).on_way_bytes -= size_bytes

    def silent_s(self, name: str, since: float) -> float:
        """For how long nothing came from an owner that was asked then (`time.monotonic()`)."""
        return time.monotonic() - max(since, self._named(name).heard_at)

    def _named(self, name: str) -> _Owner:
        return next(owner for owner in self._owners if owner.remote.name == name)

    def _lose(self, owner: _Owner, error: Exception) -> None:
        if not owner.lost:
            _log.warning("owner %s is not read from any more: %s", owner.remote.name, error)
        owner.lost = owner.lost or str(error)
