"""Those whose memory is read: whom to ask next, who is gone, who gave wrong bytes.

Each has a few reads under way at a time, and the next one goes to whoever has the fewest bytes to deliver for its share: who is
faster than its share, or serves fewer others, gives more. One with a rate is not asked before that allows it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ckpt_core.errors import PeerLost, TransportError
from ckpt_core.p2p.rate import TokenBucket
from ckpt_core.source import RemoteOwner
from ckpt_core.transport.p2p.base import OneSided, Pending, Read

_log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 22  # of one read at most: large enough to be cheap, small enough that owners share a tensor
_WINDOW_BYTES = 16 << 20
_LEAST_SHARE = 1e-3


@dataclass(slots=True, kw_only=True)
class _Owner:
    """One of them.

    Attributes:
        peer: its name in the library.
        heard_at: time of its last bytes.
        limit, not_before: of what is read of it, and when it may be asked again.
    """

    remote: RemoteOwner
    peer: str = ""
    limit: TokenBucket | None = None
    not_before: float = 0.0
    on_way_bytes: int = 0
    heard_at: float = 0.0
    got_bytes: int = 0
    lost: str = ""

    @property
    def debt(self) -> float:
        """What it has to deliver, by its share."""
        return self.on_way_bytes / max(self.remote.share, _LEAST_SHARE)

    @property
    def has_room(self) -> bool:
        """Whether it may be asked now."""
        return self.on_way_bytes < _WINDOW_BYTES and time.monotonic() >= self.not_before


class Owners:
    """Of one version.

    Args:
        library: open in this process; all owners are of it.
        first: which is asked first, among equals.
        readers: agents of this host, among which rates are divided.

    Raises:
        PeerLost: none can be reached.
    """

    def __init__(self, library: OneSided, remotes: Sequence[RemoteOwner], *, first: int = 0, readers: int = 1) -> None:
        self._library = library
        start = first % len(remotes)
        self._owners = [_owner(remote, readers) for remote in (*remotes[start:], *remotes[:start])]
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

    def next(self, avoid: Collection[str]) -> str | None:
        """Whom to ask; None where all have enough to do.

        Args:
            avoid: never these.

        Raises:
            PeerLost: nobody is left, or all of them were to be avoided.
        """
        able = [owner for owner in self._owners if not owner.lost and owner.remote.name not in avoid]
        if not able:
            gone = "; ".join(f"{owner.remote.name}: {owner.lost or 'gave wrong bytes'}" for owner in self._owners)
            raise PeerLost(f"no owner is left to read from ({gone}); join from others")
        best = min((owner for owner in able if owner.has_room), key=lambda owner: owner.debt, default=None)
        return best.remote.name if best is not None else None

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
        if owner.limit is not None:
            owner.not_before = time.monotonic() + owner.limit.take(size_bytes)
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


def _owner(remote: RemoteOwner, readers: int) -> _Owner:
    rate = remote.max_bytes_per_s / readers
    return _Owner(remote=remote, limit=TokenBucket(rate, burst_bytes=CHUNK_BYTES) if rate else None)
